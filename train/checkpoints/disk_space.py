"""Checks before training that the disk has room for the checkpoints of a run."""

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
    folder = folder.absolute()
    held = sum(path.name.isdecimal() for path in folder.iterdir()) if folder.is_dir() else 0
    count, there = max(1, keep + 1 - held), next(path for path in (folder, *folder.parents) if path.is_dir())
    size, free = estimate(state), shutil.disk_usage(there).free
    if free < count * size:
        log.warning(
            "%s: the run will save %d checkpoints of %s MB, but the disk has only %s MB free: free some space, keep "
            "fewer with --keep-checkpoints, or give another folder with --run",
            *(folder, count, f"{size / 1e6:,.1f}", f"{free / 1e6:,.1f}"),
        )
