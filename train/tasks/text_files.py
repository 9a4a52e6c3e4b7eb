"""Text of one's own to model: the lines, or the paragraphs, of files."""

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
    """Text of UTF-8 files, plain or .gz, for language models and encoders of hidden tokens: the source is empty.

    Each line is an example, or each paragraph: lines without a blank one between them. One that is longer than
    `characters` is cut into several. Lines and paragraphs that are repeated, in whichever files, are used once, and all
    pieces of one are in the same split. A piece that two splits have, such as the first lines of a licence, is left out
    of training, and of validation where the test has it. `train.tasks.lines.read_lines` says what a line is.
    """

    objective: ClassVar[Literal["Continuation"]] = "Continuation"

    unit: Literal["line", "paragraph"] = "line"
    """what is an example, and never in two splits"""
    characters: int = 512
    """most characters of an example; a longer paragraph is cut at the end of a line, a longer line anywhere"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("characters", self.characters, 1)

    def encoder_objective(self) -> Literal["Masking"]:
        """Hidden tokens of the text; there are no labels."""
        return "Masking"

    def load(self) -> dict[str, Dataset]:
        """The splits; ValueError or FileNotFoundError, naming file and line where there is one, if that cannot be."""
        found = self.found(_lines if self.unit == "line" else _paragraphs)
        return splits(**self._cut(self.divide(found)))

    def _cut(self, divided: Mapping[str, Sequence[Pair]]) -> dict[str, list[Pair]]:
        """The pieces that are not blank and stand in no other split, compared without blanks at their ends."""
        cut: dict[str, list[Pair]] = {}
        seen: set[str] = set()
        for split in ("test", "validation", "train"):
            found = [piece for text, _ in divided[split] for piece in pieces(text, self.characters) if piece.strip()]
            cut[split] = [("", piece) for piece in found if piece.strip() not in seen]
            seen.update(piece.strip() for _, piece in cut[split])
            if left_out := len(found) - len(cut[split]):
                log.warning("%s: %d of %d pieces left out, which stand in another split", split, left_out, len(found))
            if not cut[split]:
                raise ValueError(
                    f"nothing to use for {split}: all its {len(found)} pieces stand in another split, too; give other "
                    f"texts, or larger pieces with --task.characters ({self.characters})"
                )
        return cut


def _lines(file: Path) -> Iterator[Pair]:
    return ((line, "") for line in read_lines(file))


def _paragraphs(file: Path) -> Iterator[Pair]:
    for is_text, lines in groupby(read_lines(file), key=lambda line: bool(line.strip())):
        if is_text:
            yield "\n".join(lines), ""
