"""Text classification: lines of Python source to the package that contains them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset

from seqattn.checks import check_integer
from train.tasks.standard_library import Example, SourceFile, SourceTask, split_lines

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
"""The packages of the standard library with the most files, without the folders in `LEFT_OUT`."""


@dataclass(frozen=True)
class CodeTopics(SourceTask):
    """Consecutive lines of Python source to the standard-library package that contains them.

    No piece and no file is in two splits, so a model must learn the style of a package rather than its files.
    """

    packages: tuple[str, ...] = PACKAGES
    """classes: names of folders directly under the root, at least two"""
    lines: int = 10
    """number of lines of each piece; a shorter rest at the end of a file is dropped"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.packages)) < max(2, len(self.packages)):
            raise ValueError(f"packages ({', '.join(self.packages)}) must be two or more different names")
        check_integer("lines", self.lines, 1)

    def encoder_objective(self) -> Literal["Classification"]:
        """Returns "Classification": one label for each text."""
        return "Classification"

    def load(self) -> dict[str, Dataset]:
        """Cuts the splits from the source files.

        Raises:
            FileNotFoundError: the root folder does not exist.
            ValueError: a package has no training example, or a split is empty.
        """
        loaded = self.cut(self._examples)
        missing = sorted(set(self.packages) - set(loaded["train"]["target"]))
        if missing:
            raise ValueError(
                f"no training examples for {', '.join(missing)}: the folder does not exist or has too few files"
            )
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
