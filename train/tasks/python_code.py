"""Python source as text to model: pieces of the files of the standard library."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from datasets import Dataset

from seqattn.checks import check_integer
from train.tasks.standard_library import Example, SourceFile, SourceTask, split_lines


@dataclass(frozen=True)
class PythonCode(SourceTask):
    """Consecutive pieces of Python source, for language models: the source is empty, the target a piece.

    The pieces of a file in their order are the whole file; no file is in two splits.
    """

    objective: ClassVar[Literal["Continuation"]] = "Continuation"

    characters: int = 512
    """most characters of a piece; it ends at the end of a line, but where a line is longer"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("characters", self.characters, 1)

    def encoder_objective(self) -> Literal["Masking"]:
        """Hidden tokens of the text; there are no labels."""
        return "Masking"

    def load(self) -> dict[str, Dataset]:
        """The splits; FileNotFoundError or ValueError where there is no folder, or too few files in it."""
        return self.cut(self._examples)

    def _examples(self, file: SourceFile) -> Iterator[Example]:
        for number, piece in enumerate(pieces(file.text, self.characters)):
            yield Example("", piece, key=f"{file.path}:{number}")


def pieces(text: str, characters: int) -> Iterator[str]:
    r"""Consecutive pieces of a text: whole lines, as many as fit, and a line that is longer cut anywhere.

    >>> list(pieces("a\nbc\ndefghijk\n", 5))
    ['a\nbc\n', 'defgh', 'ijk\n']
    """
    piece = ""
    for line in split_lines(text):
        if len(piece) + len(line) > characters and piece:
            yield piece
            piece = ""
        piece += line
        while len(piece) > characters:
            yield piece[:characters]
            piece = piece[characters:]
    if piece:
        yield piece
