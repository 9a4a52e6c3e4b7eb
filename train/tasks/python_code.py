"""Language modeling of Python source: pieces of the files of the standard library."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from datasets import Dataset

from seqattn.checks import check_integer
from train.tasks.standard_library import Example, SourceFile, SourceTask, split_lines


@dataclass(frozen=True)
class PythonCode(SourceTask):
    """Consecutive pieces of Python source, for language models: the source is empty, the target is a piece.

    The pieces of a file, in order, make up the whole file. No file is in two splits.
    """

    objective: ClassVar[Literal["Continuation"]] = "Continuation"

    characters: int = 512
    """maximum number of characters of a piece; pieces end at line ends, except in lines longer than this"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("characters", self.characters, 1)

    def encoder_objective(self) -> Literal["Masking"]:
        """Returns "Masking": an encoder learns hidden tokens, as the texts have no labels."""
        return "Masking"

    def load(self) -> dict[str, Dataset]:
        """Cuts the splits from the source files.

        Raises:
            FileNotFoundError: the root folder does not exist.
            ValueError: a split is empty, because the folder has too few files.
        """
        return self.cut(self._examples)

    def _examples(self, file: SourceFile) -> Iterator[Example]:
        for number, piece in enumerate(pieces(file.text, self.characters)):
            yield Example("", piece, key=f"{file.path}:{number}")


def pieces(text: str, characters: int) -> Iterator[str]:
    r"""Cuts a text into consecutive pieces of at most `characters` characters.

    A piece holds as many whole lines as fit. A line longer than `characters` is cut anywhere.

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
