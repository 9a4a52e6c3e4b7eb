"""Language modeling of your own text: the lines or paragraphs of files."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar, Literal

from datasets import Dataset

from seqattn.checks import check_integer
from train.tasks.lines import read_lines
from train.tasks.own_files import OwnFiles
from train.tasks.python_code import pieces
from train.tasks.task import Pair, splits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextFiles(OwnFiles):
    """Text from UTF-8 files, plain or .gz, for language models and masked-token encoders; sources are empty.

    Each line is an example, or each paragraph, which ends at a blank line. Units longer than `characters` are cut into
    several pieces, all in the same split. A unit that occurs several times, in any files, is used once. A piece that
    occurs in two splits, such as the first lines of a license, is left out of training, and of validation if the test
    has it. `train.tasks.lines.read_lines` defines what a line is.
    """

    objective: ClassVar[Literal["Continuation"]] = "Continuation"

    unit: Literal["line", "paragraph"] = "line"
    """unit of text that makes one example and is never in two splits; paragraphs are separated by blank lines"""
    characters: int = 512
    """maximum number of characters of an example; longer paragraphs are cut at line ends, longer lines anywhere"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("characters", self.characters, 1)

    def encoder_objective(self) -> Literal["Masking"]:
        """Returns "Masking": an encoder learns hidden tokens, as the texts have no labels."""
        return "Masking"

    def load(self) -> dict[str, Dataset]:
        """Reads the files and divides them into splits.

        Raises:
            FileNotFoundError: a file or folder does not exist.
            ValueError: a line cannot be read (the message names file and line), or a split is empty.
        """
        found = self.found(_lines if self.unit == "line" else _paragraphs)
        return splits(**self._cut(self.divide(found)))

    def _cut(self, divided: Mapping[str, Sequence[Pair]]) -> dict[str, list[Pair]]:
        """Cuts each split into pieces and drops blank ones and those that the test, or then validation, has already.

        Pieces are compared without white space at their ends.
        """
        cut: dict[str, list[Pair]] = {}
        seen: set[str] = set()
        for split in ("test", "validation", "train"):
            found = [piece for text, _ in divided[split] for piece in pieces(text, self.characters) if piece.strip()]
            cut[split] = [("", piece) for piece in found if piece.strip() not in seen]
            seen.update(piece.strip() for _, piece in cut[split])
            if left_out := len(found) - len(cut[split]):
                log.warning("%s: left out %d of %d pieces, which occur in another split", split, left_out, len(found))
            if not cut[split]:
                raise ValueError(
                    f"nothing to use for {split}: all its {len(found)} pieces also occur in another split; give other "
                    f"texts, or larger pieces with --task.characters ({self.characters})"
                )
        return cut


def _lines(file: Path) -> Iterator[Pair]:
    return ((line, "") for line in read_lines(file))


def _paragraphs(file: Path) -> Iterator[Pair]:
    for is_text, lines in groupby(read_lines(file), key=lambda line: bool(line.strip())):
        if is_text:
            yield "\n".join(lines), ""
