"""Rules over the source text of train/; each is a pure function and is shown to catch offenders."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "train").rglob("*.py"))

# They run code that they find in a file, or write where a file says.
UNSAFE = frozenset(
    "pickle marshal shelve dill cloudpickle joblib yaml eval exec tarfile zipfile shutil.unpack_archive torch.load "
    "numpy.load jax.numpy.load pandas.read_pickle".split()
)
# A clock that may be set back.
SETTABLE = frozenset(
    "time.time time.time_ns time.clock_gettime datetime.datetime.now datetime.datetime.utcnow "
    "datetime.datetime.today datetime.date.today".split()
)


def used_names(source: str) -> Iterator[str]:
    """Every name that a file imports or uses, with the names of its imports written out: `np.load` is "numpy.load"."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            yield known.get(first, first) + dot + rest


def found(source: str, forbidden: frozenset[str]) -> set[str]:
    """Which of the forbidden names, or names inside them, a file uses."""
    return {name for name in used_names(source) if any(f"{name}.".startswith(f"{bad}.") for bad in forbidden)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_c20_d20_nothing_is_unpickled_or_unpacked(path):
    assert not found(path.read_text("utf-8"), UNSAFE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_e18_no_time_is_measured_by_a_clock_that_can_be_set_back(path):
    # The lock says since when it is held, in words.
    allowed = {"datetime.datetime.now"} if path.name == "lock.py" else set()
    assert found(path.read_text("utf-8"), SETTABLE) <= allowed


@pytest.mark.parametrize(
    ("source", "forbidden"),
    [
        ("import pickle", UNSAFE),
        ("from pickle import loads as read", UNSAFE),
        ("import numpy as np\nnp.load(file)", UNSAFE),
        ("from numpy import load", UNSAFE),
        ("import shutil\nshutil.unpack_archive(file)", UNSAFE),
        ("import torch\nread = torch.load", UNSAFE),
        ("eval(text)", UNSAFE),
        ("import time\nbegun = time.time()", SETTABLE),
        ("from time import time as now", SETTABLE),
        ("import datetime\ndatetime.datetime.now()", SETTABLE),
        ("from datetime import datetime\ndatetime.now()", SETTABLE),
    ],
)
def test_offenders_are_caught(source, forbidden):
    assert found(source, forbidden)
    harmless = "import time, numpy as np, shutil\ntime.monotonic(), np.loadtxt, shutil.rmtree, evaluate, self.eval"
    assert not found(harmless, forbidden)
