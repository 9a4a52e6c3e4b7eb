"""Text that every machine has: the source of Python's standard library, split by file."""

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
"""About one file in so many is for validation, and as many are for the test."""

# Not every installation has the first three and ensurepip, and newer Pythons have neither lib2to3 nor distutils; the
# others are tests, tables and texts that a program wrote, and what is not of the library at all.
LEFT_OUT = frozenset(
    "idlelib tkinter turtledemo lib2to3 distutils ensurepip test tests encodings pydoc_data __phello__ site-packages "
    "dist-packages __pycache__".split()
)
"""Folders that are not read, wherever they are; neither is one whose name starts with "config-"."""


@dataclass(frozen=True)
class SourceFile:
    """One file of Python source.

    Attributes:
        path: where it is in the library, as in "email/parser.py".
        text: what it holds, in NFC, with "\\n" at the ends of lines.
    """

    path: str
    text: str

    @property
    def split(self) -> str:
        """The split it belongs to: a function of the path alone, so the same on every machine and in every Python."""
        # 859 is a number that gives both held-out splits 2 to 24 % of each package of CodeTopics, in 3.11 to 3.13.
        # Some file systems write names in another normal form than they were given.
        path = unicodedata.normalize("NFC", self.path)
        digest = hashlib.blake2b(f"859:{path}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "big") % HELD_OUT
        return {0: "test", 1: "validation"}.get(number, "train")


class Example(NamedTuple):
    """A pair, and what makes it another one than the others: of several examples with one key, the first is kept."""

    source: str
    target: str
    key: str


@dataclass(frozen=True)
class SourceTask(Task):
    """The settings of a task whose examples are cut from files of Python source."""

    root: Path | None = None
    """folder of Python source to read; without it, the standard library of the running Python"""
    train_examples: int | None = None
    """most examples to train on, drawn by the seed; fewer are some of those of more; None for all there are"""
    validation_examples: int | None = 1_000
    """most examples that watch over the training"""
    test_examples: int | None = 1_000
    """most examples that judge the trained model"""
    seed: int = 0
    """any integer; it decides which examples are drawn, and their order"""

    def __post_init__(self) -> None:
        for name in ("train_examples", "validation_examples", "test_examples"):
            most = getattr(self, name)
            if most is not None:
                check_integer(name, most, 1, hint=", or None for all there are")

    def cut(self, examples: Callable[[SourceFile], Iterable[Example]]) -> dict[str, Dataset]:
        """The splits of what each file gives. No file is in two splits, and no key: the test's example is kept."""
        found: dict[str, list[Example]] = {"test": [], "validation": [], "train": []}
        for file in read_source(self.root):
            found[file.split].extend(examples(file))
        seen: set[str] = set()
        chosen = {}
        for split, rows in found.items():
            distinct = {row.key: (row.source, row.target) for row in reversed(rows) if row.key not in seen}
            seen |= distinct.keys()
            pairs = list(reversed(distinct.values()))
            order = generator(self.seed).permutation(len(pairs))[: getattr(self, f"{split}_examples")]
            chosen[split] = [pairs[number] for number in order]
        return splits(**chosen)


def read_source(root: Path | None = None) -> Iterator[SourceFile]:
    """The files of Python source under a folder, in the order of their paths.

    Left out are the folders of `LEFT_OUT`, files of `sysconfig` that a build wrote, and files that are empty, that
    cannot be decoded, or that have the text of one before. Whether a file parses is not asked.

    Args:
        root: the folder; None is the standard library of the running Python.

    Raises:
        FileNotFoundError: there is no such folder.
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
    r"""The lines of a text with their ends; only "\n" ends a line, not the form feed that some files hold.

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
    """What a file holds; nothing where it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return unicodedata.normalize("NFC", file.read())
    except (SyntaxError, UnicodeDecodeError):
        return ""
