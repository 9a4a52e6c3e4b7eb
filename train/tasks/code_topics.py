"""Lines of Python source to the package that they are from: a task of classification."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset

from seqattn.checks import check_integer
from train.tasks.standard_library import Example, SourceFile, SourceTask, split_lines

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
"""The packages of the standard library with the most files, after those that `LEFT_OUT` names."""


@dataclass(frozen=True)
class CodeTopics(SourceTask):
    """Consecutive lines of Python source to the package of the standard library that holds them.

    No piece is in two splits, and no file: what is learnt is how a package is written.
    """

    packages: tuple[str, ...] = PACKAGES
    """the classes: folders directly under the root"""
    lines: int = 10
    """lines of a piece; what is left of a file is left out"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.packages)) < max(2, len(self.packages)):
            raise ValueError(f"packages ({', '.join(self.packages)}) must be two or more different ones")
        check_integer("lines", self.lines, 1)

    def encoder_objective(self) -> Literal["Classification"]:
        """A label for each text."""
        return "Classification"

    def load(self) -> dict[str, Dataset]:
        """The splits; FileNotFoundError or ValueError where there is no folder, or too few files of a package in it."""
        loaded = self.cut(self._examples)
        missing = sorted(set(self.packages) - set(loaded["train"]["target"]))
        if missing:
            raise ValueError(f"nothing to train on for {', '.join(missing)}: no such folder, or too few files in it")
        return loaded

    def _examples(self, file: SourceFile) -> Iterator[Example]:
        package = file.path.partition("/")[0]
        if package not in self.packages:
            return
        rows = list(split_lines(file.text))
        for start in range(0, len(rows) - self.lines + 1, self.lines):
            piece = "".join(rows[start : start + self.lines])
            if piece.strip():
                yield Example(piece, package, key=piece)
