"""Every fault case has a test named after it, `test_c8_...` or, for several, `test_d1_d15_...`, or a reason why not.

The cases are what broke somebody's run elsewhere, in groups: A attention, masks and positions; B recurrence, losses and
decoding; C data and tokenizers; D checkpoints and export; E training runs, devices and their surroundings.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CASES = [
    f"{group}{number}"
    for group, count in zip("ABCDE", (29, 15, 22, 23, 18), strict=True)
    for number in range(1, count + 1)
]

REASONS: dict[str, str] = {}
"""Cases that cannot be tested here: why, in a sentence."""


def functions(source: str) -> Iterator[str]:
    """The names of the test functions of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name


def cases(name: str) -> list[str]:
    """The cases that the name of a test begins with.

    >>> cases("test_d1_d15_a_run_that_is_killed_at_b4")
    ['D1', 'D15']
    """
    beginning = re.match(r"test((?:_[a-e][0-9]+)+)_", name)
    return beginning[1].upper().split("_")[1:] if beginning else []


def faults(names: Iterable[str], reasons: Mapping[str, str]) -> list[str]:
    """What is wrong with the tests of these names, and the reasons for what has none."""
    tested = {case: name for name in names for case in cases(name)}
    wrong = [f"{case} has neither a test nor a reason" for case in CASES if case not in tested and case not in reasons]
    wrong += [f"{case} has a reason, and {tested[case]}" for case in reasons if case in tested]
    wrong += [f"{case} is no case, in {name}" for case, name in tested.items() if case not in CASES]
    wrong += [f"{case} is no case, in REASONS" for case in reasons if case not in CASES]
    return wrong + [f"the reason for {case} is empty" for case, reason in reasons.items() if not reason.strip()]


def test_every_case_has_a_test_or_a_reason():
    found = [name for path in TESTS.rglob("test_*.py") for name in functions(path.read_text("utf-8"))]
    assert len(CASES) == 107
    assert not faults(found, REASONS)


ALL = [f"test_{case.lower()}_holds" for case in CASES]


@pytest.mark.parametrize(
    ("names", "reasons", "wrong"),
    [
        (ALL, {}, []),
        ([*ALL[:-2], "test_e17_e18_hold"], {}, []),
        (ALL[1:], {"A1": "It needs a TPU."}, []),
        (ALL[1:], {}, ["A1 has neither a test nor a reason"]),
        ([*ALL[1:], "test_of_a1_", "test_a1", "test_a11_a_mask_of_a1_"], {}, ["A1 has neither a test nor a reason"]),
        (ALL, {"B2": "It needs a TPU."}, ["B2 has a reason, and test_b2_holds"]),
        ([*ALL, "test_a30_holds"], {}, ["A30 is no case, in test_a30_holds"]),
        (ALL, {"F1": "It needs a TPU."}, ["F1 is no case, in REASONS"]),
        (ALL[:-1], {"E18": " "}, ["the reason for E18 is empty"]),
    ],
)
def test_what_is_missing_is_found(names, reasons, wrong):
    assert faults(names, reasons) == wrong


def test_tests_are_found_in_classes_and_not_in_strings():
    source = "def test_a1_():\n    'def test_a3_(): pass'\nclass TestB:\n    def test_a2_(self): pass\ndef make(): pass"
    assert sorted(functions(source)) == ["test_a1_", "test_a2_"]
