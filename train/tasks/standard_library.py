"""Text that every machine has: the source code of Python's standard library, split by file."""

import hashlib
import io
import sysconfig
import tokenize
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from datasets import Dataset

from seqattn.checks import check_integer
from train.tasks.task import Task, generator, splits

HELD_OUT = 10
"""About one file in `HELD_OUT` is for validation, and about as many are for the test."""

# Not every installation has the first three folders and ensurepip, and newer Pythons lack lib2to3 and distutils. The
# others hold tests, generated tables and texts, and files that are not part of the library.
LEFT_OUT = frozenset(
    "idlelib tkinter turtledemo lib2to3 distutils ensurepip test tests encodings pydoc_data __phello__ site-packages "
    "dist-packages __pycache__".split()
)
"""Names of folders that are not read, at any depth. Folders that start with "config-" are not read either."""


@dataclass(frozen=True)
class SourceFile:
    """One file of Python source.

    Attributes:
        path: path inside the library, such as "email/parser.py".
        text: content in NFC, with "\\n" as line end.
    """

    path: str
    text: str

    @property
    def split(self) -> str:
        """The split of the file. It depends on the path only, so it is the same on all machines and Python versions."""
        # The salt 859 puts 2 to 24 % of each package of CodeTopics into both held-out splits, in Python 3.11 to 3.13.
        # NFC, as some file systems store names in another normal form.
        path = unicodedata.normalize("NFC", self.path)
        digest = hashlib.blake2b(f"859:{path}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "big") % HELD_OUT
        return {0: "test", 1: "validation"}.get(number, "train")


class Example(NamedTuple):
    """A pair of texts and a key that identifies it: of several examples with equal keys, the first is kept."""

    source: str
    target: str
    key: str


@dataclass(frozen=True)
class SourceTask(Task):
    """Settings of a task that cuts its examples from files of Python source."""

    root: Path | None = None
    """folder of Python source; None is the standard library of the running Python"""
    train_examples: int | None = None
    """maximum number of training examples, drawn by the seed; a smaller number is a subset of a larger one; None is
    all"""
    validation_examples: int | None = 1_000
    """maximum number of validation examples; None is all"""
    test_examples: int | None = 1_000
    """maximum number of test examples; None is all"""
    seed: int = 0
    """any integer; decides which examples are drawn, and their order"""

    def __post_init__(self) -> None:
        for name in ("train_examples", "validation_examples", "test_examples"):
            most = getattr(self, name)
            if most is not None:
                check_integer(name, most, 1, hint=", or None for all")

    def cut(self, examples: Callable[[SourceFile], Iterable[Example]]) -> dict[str, Dataset]:
        """Divides the examples of all files into splits. No file and no key is in two splits; the test keeps a key.

        Args:
            examples: cuts the examples of one file.

        Raises:
            FileNotFoundError: the root folder does not exist.
            ValueError: a split is empty.
        """
        # The order of these keys is the order of precedence: a key stays in the first split that has it.
        found: dict[str, list[Example]] = {"test": [], "validation": [], "train": []}
        for file in read_source(self.root):
            found[file.split].extend(examples(file))
        seen: set[str] = set()
        chosen = {}
        for split, rows in found.items():
            # Reversed twice: a dict keeps the last value of a key, and the first example of a key is wanted.
            distinct = {row.key: (row.source, row.target) for row in reversed(rows) if row.key not in seen}
            seen |= distinct.keys()
            pairs = list(reversed(distinct.values()))
            order = generator(self.seed).permutation(len(pairs))[: getattr(self, f"{split}_examples")]
            chosen[split] = [pairs[number] for number in order]
        return splits(**chosen)


def read_source(root: Path | None = None) -> Iterator[SourceFile]:
    """Yields the Python files under a folder, in the order of their paths.

    Skips the folders of `LEFT_OUT`, the files of `sysconfig` that a build wrote, and files that are empty, cannot be
    decoded, or have the same text as an earlier one. Files need not be valid Python.

    Args:
        root: the folder; None is the standard library of the running Python.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    if not root.is_dir():
        raise FileNotFoundError(f"--task.root: there is no folder {root}")
    seen = {""}
    for path in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        text = "" if _is_left_out(PurePosixPath(path)) else _text(root / path)
        if text not in seen:
            seen.add(text)
            yield SourceFile(path, text)


def split_lines(text: str) -> Iterator[str]:
    r"""Iterates over the lines of a text, with their ends; only "\n" ends a line, not a form feed.

    >>> list(split_lines("a\n\fb\nc"))
    ['a\n', '\x0cb\n', 'c']
    """
    return iter(io.StringIO(text, newline="\n"))


def _is_left_out(path: PurePosixPath) -> bool:
    folders = path.parts[:-1]
    return (
        not LEFT_OUT.isdisjoint(folders)
        or any(folder.startswith("config-") for folder in folders)
        or path.name.startswith("_sysconfigdata")
    )


def _text(path: Path) -> str:
    """Returns the content of a file in NFC, or "" if it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return unicodedata.normalize("NFC", file.read())
    except (SyntaxError, UnicodeDecodeError):
        return ""
