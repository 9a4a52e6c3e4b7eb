"""Whether a disk has room for the checkpoints of a run, before it is trained."""

import logging
import shutil
from pathlib import Path

import jax

from train.update.step import TrainState

log = logging.getLogger(__name__)


def estimate(state: TrainState) -> int:
    """How many bytes a checkpoint of a state takes, if they do not compress."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def check_space(folder: Path, state: TrainState, keep: int) -> None:
    """Warns where a disk has no room for the checkpoints of a run: those that stay, and the one being written.

    Args:
        folder: of the checkpoints, as in `Checkpoints`; the steps that it holds already need no more room.
        state: what is saved.
        keep: how many stay.
    """
    folder = folder.absolute()
    held = sum(path.name.isdecimal() for path in folder.iterdir()) if folder.is_dir() else 0
    count, there = max(1, keep + 1 - held), next(path for path in (folder, *folder.parents) if path.is_dir())
    size, free = estimate(state), shutil.disk_usage(there).free
    if free < count * size:
        log.warning(
            "%s: %d checkpoints of %s MB are to come, and the disk has %s MB free: free some space, keep fewer with "
            "--keep-checkpoints, or give another folder with --run",
            *(folder, count, f"{size / 1e6:,.1f}", f"{free / 1e6:,.1f}"),
        )
