"""Examples from files of one's own: which files they are, and how they are divided into splits by what they say."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seqattn.checks import check_number
from train.tasks.task import Pair, Task, normalized

log = logging.getLogger(__name__)

_BLANK, _ELSEWHERE = "are blank", "stand in another split"
_AGAIN, _CONTRADICTED = "are repeated", "are repeated with another label"


@dataclass(frozen=True)
class OwnFiles(Task):
    """Where the files of a task lie, and what is held out where a split has none.

    A folder stands for all files in it and in its folders, in the order of their names, without hidden ones. It may
    hold links to files, but none to folders.
    """

    train: Path | None = None
    """file to train on, plain or .gz, or a folder of such files"""
    validation: Path | None = None
    """file or folder that watches over the training; without it, a share of the training examples does"""
    test: Path | None = None
    """file or folder that judges the trained model; without it, a share of the training examples does"""
    validation_share: float = 0.1
    """share of the training examples to hold out where there is no validation file"""
    test_share: float = 0.1
    """share of the training examples to hold out where there is no test file"""
    seed: int = 0
    """any integer; it decides which examples are held out"""

    def __post_init__(self) -> None:
        for name in ("validation_share", "test_share"):
            check_number(name, getattr(self, name), above=0, below=1)
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share ({self.validation_share}) and test_share ({self.test_share}) must be less than 1 "
                "together: they are held out of training"
            )

    def found(self, read: Callable[[Path], Iterable[Pair]]) -> dict[str, list[Pair]]:
        """What the files of each split that was given hold.

        Args:
            read: the examples of a file.

        Raises:
            ValueError: no training file is given, or a folder has no file, or holds something that is neither file nor
                folder, such as a link to a folder or to nothing; or what `read` raises.
            FileNotFoundError: there is no such file or folder.
        """
        if self.train is None:
            raise ValueError("set --task.train to a file or folder; --task.validation and --task.test may be given too")
        paths = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            split: [pair for file in _files(path, f"--task.{split}") for pair in read(file)]
            for split, path in paths.items()
            if path is not None
        }

    def divide(self, found: Mapping[str, Sequence[Pair]]) -> dict[str, list[Pair]]:
        """The distinct examples (text, label) of all three splits; the counts of those that are left out are logged.

        Texts are compared in NFC and without blanks at their ends, and none is in two splits: those of the test stay
        there, then those of validation. Of a text that is repeated the first one is kept, as it stands. Which split
        holds a text that is held out depends on the text and the seed alone, not on what else the files hold.

        Raises:
            ValueError: nothing is left for a split; the message has the counts of all three, and the settings by which
                texts are held out.
        """
        rows: dict[str, list[Pair]] = {"test": [], "validation": [], "train": []}
        for split, pairs in found.items():
            for pair in normalized(pairs):
                text = pair[0].strip()
                held_out = split == "train" and text
                rows[self._held_out(text, found) if held_out else split].append(pair)
        chosen: dict[str, dict[str, Pair]] = {}
        counts: dict[str, str] = {}
        for split, pairs in rows.items():
            chosen[split], left_out = _distinct(pairs, set().union(*chosen.values()))
            reasons = "".join(f", {count} {reason}" for reason, count in left_out.items())
            counts[split] = f"{split}: {len(chosen[split])} of {len(pairs)} examples kept{reasons}"
            if len(chosen[split]) < len(pairs):
                log.warning("%s", counts[split])
        if empty := [split for split, kept in chosen.items() if not kept]:
            cure = self._how_to_fill([split for split in empty if split not in found])
            raise ValueError(f"nothing to use for {' and '.join(empty)} ({'; '.join(counts.values())}){cure}")
        return {split: list(kept.values()) for split, kept in chosen.items()}

    def _how_to_fill(self, drawn: Sequence[str]) -> str:
        """What helps where nothing was drawn for these splits."""
        if not drawn:
            return ""
        shares = " and ".join(f"--task.{split}-share ({getattr(self, f'{split}_share')})" for split in drawn)
        files = " and ".join(f"--task.{split}" for split in drawn)
        return (
            f": {shares} of the training texts are drawn by --task.seed ({self.seed}); give more texts, a larger "
            f"share, another seed, or other texts with {files}"
        )

    def _held_out(self, text: str, given: Iterable[str]) -> str:
        """The split of a text of the training files."""
        digest = hashlib.blake2b(f"{self.seed}:{text}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "big") / 2**64
        for split, share in (("test", self.test_share), ("validation", self.validation_share)):
            if split not in given:
                if number < share:
                    return split
                number -= share
        return "train"


def _distinct(pairs: Sequence[Pair], seen: set[str]) -> tuple[dict[str, Pair], Counter[str]]:
    """The examples that are kept, by their texts without blanks at the ends; and why how many others are not."""
    kept: dict[str, Pair] = {}
    reasons: Counter[str] = Counter()
    for pair in pairs:
        text = pair[0].strip()
        if not text:
            reasons[_BLANK] += 1
        elif text in seen:
            reasons[_ELSEWHERE] += 1
        elif text in kept:
            reasons[_AGAIN if kept[text][1] == pair[1] else _CONTRADICTED] += 1
        else:
            kept[text] = pair
    return kept, reasons


def _files(path: Path, flag: str) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise FileNotFoundError(f"{flag}: there is no file or folder {path}")
    found = sorted(_within(path, flag), key=Path.as_posix)
    if not found:
        raise ValueError(f"{flag}: the folder {path} has no file")
    yield from found


def _within(folder: Path, flag: str) -> Iterator[Path]:
    """The files of a folder and of its folders, without hidden ones."""
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not entry.is_symlink():
            yield from _within(entry, flag)
        else:
            kind = "a link to no file" if entry.is_symlink() else "neither a file nor a folder"
            raise ValueError(f"{flag}: {entry} is {kind}: remove it, or put the files themselves in its place")
