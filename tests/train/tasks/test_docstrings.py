import pytest

from train.tasks.docstrings import Docstrings, functions
from train.tasks.standard_library import SourceFile

TEXT = '''
class A:
    @property
    async def first(self,
                    x):  # kept
        """
        Says  what.

        More.
        """
        # also kept
        def inner():
            "Inner."; return 0
        return """two
        lines"""

    def second(self): return 1

    def other(self): "On the line of def."; \\
        return 1

    def third(self):
        """Nothing beside it."""

    def fourth(self):
        """  """
        return 4


def fifth():
    'One line.'

    return "\\d"  # a wrong escape
'''


def test_functions_without_their_docstring():
    found = {example.target: example for example in functions(TEXT)}
    assert found.keys() == {"Says  what.", "One line."}
    assert found["One line."].source == 'def fifth():\n\n    return "\\d"  # a wrong escape'
    assert found["One line."].key == 'return "\\d"  # a wrong escape'
    assert found["Says  what."].source.split("\n") == [
        "async def first(self,",
        "                x):  # kept",
        "    # also kept",
        "    def inner():",
        '        "Inner."; return 0',
        '    return """two',
        '    lines"""',
    ]


MARGIN = '''
class A:
    def one(self):
        "One."
        x = """
at the margin
        """
        return x
'''


def test_a_string_at_the_margin_leaves_the_rest_without_indentation():
    (found,) = functions(MARGIN)
    assert found.source == 'def one(self):\n    x = """\nat the margin\n    """\n    return x'
    assert found.key == 'x = """\nat the margin\n"""\nreturn x'


@pytest.mark.parametrize("text", ["", "x = 1", "def f(:", "def f():\n    'a'\n    \0"])
def test_no_function_no_example(text):
    assert list(functions(text)) == []


@pytest.fixture
def root(tmp_path):
    for number in range(60):
        own = f"def f_{number}():\n    'Own {number}.'\n    return {number}\n"
        shared = f"def g_{number}():\n    'Shared {number}.'\n    return None\n"
        (tmp_path / f"{number}.py").write_text(own + shared)
    return tmp_path


def test_no_body_is_in_two_splits(root):
    loaded = Docstrings(root, validation_examples=None, test_examples=None).load()
    targets = [target for rows in loaded.values() for target in rows["target"]]
    assert len(targets) == 61
    (shared,) = [target for target in targets if target.startswith("Shared")]
    assert shared in loaded["test"]["target"][:]
    for split, rows in loaded.items():
        owners = [target.split()[1] for target in rows["target"]]
        assert {SourceFile(f"{owner}py", "").split for owner in owners} == {split}


def test_long_functions_are_left_out_of_every_split(root):
    (root / "long.py").write_text("def long():\n    'Long.'\n    return " + "1 + " * 20 + "1\n")
    loaded = Docstrings(root, max_source=40).load()
    assert "Long." not in [target for rows in loaded.values() for target in rows["target"]]
