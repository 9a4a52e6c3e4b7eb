"""Examples from your own files: which files are read, and how their texts are divided into splits."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seqattn.checks import check_number
from train.tasks.task import Pair, Task, check_held_out, normalized

log = logging.getLogger(__name__)

_BLANK, _ELSEWHERE = "are blank", "occur in another split"
_AGAIN, _CONTRADICTED = "are repeated", "are repeated with another label"


@dataclass(frozen=True)
class OwnFiles(Task):
    """The files of a task, and the shares of the training texts that are held out for splits without files.

    A folder means all files in it and its subfolders, in the order of their names, without hidden files. It may contain
    links to files, but not to folders.
    """

    train: Path | None = None
    """training file, plain or .gz, or a folder of such files; required"""
    validation: Path | None = None
    """validation file or folder; if None, a share of the training examples is held out"""
    test: Path | None = None
    """test file or folder; if None, a share of the training examples is held out"""
    validation_share: float = 0.1
    """fraction of the training examples to hold out if there is no validation file, between 0 and 1"""
    test_share: float = 0.1
    """fraction of the training examples to hold out if there is no test file, between 0 and 1"""
    seed: int = 0
    """any integer; decides which examples are held out"""

    def __post_init__(self) -> None:
        for name in ("validation_share", "test_share"):
            check_number(name, getattr(self, name), above=0, below=1)
        both_used = self.validation is None and self.test is None
        if both_used and self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"the sum of validation_share ({self.validation_share}) and test_share ({self.test_share}) must be "
                "less than 1: both are held out of the training examples"
            )

    def check_effect(self) -> None:
        """Checks that every setting of the held-out texts has an effect.

        Raises:
            ValueError: a share is set and its split has a file, or the seed is set and both splits have files. The
                message names the flag and the rule.
        """
        given = [split for split in ("validation", "test") if getattr(self, split) is not None]
        check_held_out(self, {split: f"--task.{split}" for split in given}, "share")

    def files(self) -> tuple[Path, ...]:
        """Returns the files of all splits; raises as `found` if there is none."""
        return tuple(file for split, path in self._paths().items() for file in _files(path, f"--task.{split}"))

    def found(self, read: Callable[[Path], Iterable[Pair]]) -> dict[str, list[Pair]]:
        """Reads the files of each split that has some.

        Args:
            read: reads the examples of one file.

        Returns:
            The examples by split, in the order of the files.

        Raises:
            ValueError: no training file is given, a folder has no file, or a folder contains something that is neither
                a file nor a folder, such as a link to a folder or a broken link. Also what `read` raises.
            FileNotFoundError: a file or folder does not exist.
        """
        return {
            split: [pair for file in _files(path, f"--task.{split}") for pair in read(file)]
            for split, path in self._paths().items()
        }

    def divide(self, found: Mapping[str, Sequence[Pair]]) -> dict[str, list[Pair]]:
        """Divides examples (text, label) into three splits without duplicates, and logs how many are left out.

        Texts are compared in NFC and without white space at their ends. No text is in two splits: the test split keeps
        it before validation, and validation before training. The first of several equal texts is kept, unchanged.
        Whether a text is held out depends on the text and the seed only, so adding texts to the files does not move
        others between splits.

        Args:
            found: the examples of each split with files, as from `found`.

        Raises:
            ValueError: a split is empty; the message has the counts of all three and the settings that decide what is
                held out.
        """
        # The order of these keys is the order of precedence: a text stays in the first split that has it.
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

    def _paths(self) -> dict[str, Path]:
        """The file or folder of each split that has one."""
        if self.train is None:
            raise ValueError("set --task.train to a file or folder; --task.validation and --task.test are optional")
        paths = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: path for split, path in paths.items() if path is not None}

    def _how_to_fill(self, drawn: Sequence[str]) -> str:
        """Returns advice for the error message if no text was held out for the splits `drawn`."""
        if not drawn:
            return ""
        shares = " and ".join(f"--task.{split}-share ({getattr(self, f'{split}_share')})" for split in drawn)
        files = " and ".join(f"--task.{split}" for split in drawn)
        return (
            f": {shares} of the training texts are held out by --task.seed ({self.seed}); give more texts, a larger "
            f"share, another seed, or separate texts with {files}"
        )

    def _held_out(self, text: str, given: Iterable[str]) -> str:
        """Returns the split of a text of the training files."""
        # A hash in place of a draw: the text itself decides, whatever other texts there are and in which order.
        digest = hashlib.blake2b(f"{self.seed}:{text}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "big") / 2**64
        for split, share in (("test", self.test_share), ("validation", self.validation_share)):
            if split not in given:
                if number < share:
                    return split
                number -= share
        return "train"


def _distinct(pairs: Sequence[Pair], seen: set[str]) -> tuple[dict[str, Pair], Counter[str]]:
    """Returns the examples to keep, by stripped text, and the number of the others by reason."""
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
    """Yields the files of a folder and its subfolders, without hidden ones."""
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not entry.is_symlink():
            yield from _within(entry, flag)
        else:
            # An error, as a link that is skipped in silence would leave texts out of training.
            kind = "a link that leads to no file" if entry.is_symlink() else "neither a file nor a folder"
            raise ValueError(f"{flag}: {entry} is {kind}: remove it, or replace it with the files themselves")
