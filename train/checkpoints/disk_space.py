"""Checks before training that the disk has room for what a run writes."""

import logging
import shutil
from pathlib import Path

import jax

from train.update.step import TrainState

log = logging.getLogger(__name__)


def estimate(state: TrainState) -> int:
    """Estimates the size of a checkpoint in bytes, without compression."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def check_space(folder: Path, state: TrainState, keep: int) -> None:
    """Warns if the disk lacks room for the checkpoints of a run: the ones to keep, and one being written.

    Args:
        folder: the folder of checkpoints, as in `Checkpoints`. Checkpoints already in it need no more room.
        state: the state to save, of arrays or shapes.
        keep: the number of checkpoints to keep.
    """
    held = sum(path.name.isdecimal() for path in folder.iterdir()) if folder.is_dir() else 0
    count, size = max(1, keep + 1 - held), estimate(state)
    free = _free(folder)
    if free < count * size:
        log.warning(
            "%s: the run will save %d checkpoints of %s MB, but the disk has only %s MB free: free some space, keep "
            "fewer with --keep-checkpoints, or give another folder with --run",
            *(folder, count, _megabytes(size), _megabytes(free)),
        )


def check_room(folder: Path, size: int, what: str, remedy: str) -> None:
    """Warns if the disk lacks room for something else.

    Args:
        folder: the folder that will hold it; it may be missing.
        size: its size in bytes.
        what: what it is, for the message.
        remedy: what helps, beside freeing space.
    """
    free = _free(folder)
    if free < size:
        log.warning(
            "%s: %s need about %s MB, but the disk has only %s MB free: free some space, or %s",
            *(folder, what, _megabytes(size), _megabytes(free), remedy),
        )


def _free(folder: Path) -> int:
    """The number of free bytes on the disk of a folder, which may be missing."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"
