"""Checkpoints of a run: parameters, optimizer, step, resolved config and tokenizer, by Orbax."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from train.step import TrainState


class Checkpoints:
    """The checkpoints of a run, a folder for each step; the latest few are kept.

    A step counts once its commit file is written, so a process killed while saving leaves the step before it.

    Args:
        folder: where the steps are; made if it is missing.
        keep: how many of the latest stay.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self._policy = folder.absolute(), _LatestAndOne(keep)
        self._open()

    def _open(self) -> None:
        context = ocp.Context()
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        self._checkpointer = ocp.training.Checkpointer(self.folder, context=context, preservation_policy=self._policy)

    @property
    def latest(self) -> int | None:
        """The latest step that was saved, None before the first."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, texts: dict[str, str]) -> None:
        """Writes a step with texts (resolved config, tokenizer, digest of the data); a step already there stays."""
        step = int(state.step)
        if step == self.latest:
            return
        self._checkpointer.save_checkpointables(step, {"state": jax.device_get(_named(state))}, custom_metadata=texts)

    def texts(self) -> dict[str, str]:
        """The texts of the latest step."""
        return self._checkpointer.checkpointables_metadata(self.latest).custom_metadata

    def protect(self, step: int) -> None:
        """From now on this step stays too, however many come after it; one that was protected before no longer."""
        self._policy.protected = step

    def forget_after(self, step: int) -> None:
        """Removes all later steps.

        Raises:
            ValueError: the step is not there, so nothing might be left.
        """
        if not (self.folder / str(step)).is_dir():
            raise ValueError(f"{self.folder} holds no step {step}, so the later ones stay")
        self.close()
        for path in self.folder.iterdir():
            if path.name.isdecimal() and int(path.name) > step:
                # Moved away first: a step that is half removed must not count as one.
                removed = path.rename(self.folder.with_name(f".removed-{path.name}"))
                shutil.rmtree(removed)
        self._open()

    def restore(self, like: TrainState) -> TrainState:
        """The latest state; `like` gives its structure.

        Raises:
            ValueError: names, shapes or dtypes differ; the message lists which.
        """
        wanted = _named(like)
        saved = self._checkpointer.load_checkpointables(self.latest, {"state": None})["state"]
        wrong = _differences(saved, wanted)
        if wrong:
            raise ValueError(f"{self.folder} does not fit this model:\n" + "\n".join(wrong))
        return jax.tree.unflatten(jax.tree.structure(like), [jax.numpy.asarray(saved[name]) for name in wanted])

    def close(self) -> None:
        """Releases the folder."""
        self._checkpointer.close()


class _LatestAndOne:
    """Which steps stay: the latest few, and the protected one."""

    def __init__(self, keep: int) -> None:
        self._keep, self.protected = keep, -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each step, in their order."""
        del context
        first = len(checkpoints) - self._keep
        return [index >= first or each.step == self.protected for index, each in enumerate(checkpoints)]


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves of a state by names that are also file names: Orbax wants no '.' and no '/' in them."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="-").replace(".", "-"): leaf for path, leaf in leaves}


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    def describe(leaf: Any) -> str:
        return "missing" if leaf is None else f"{np.asarray(leaf).dtype}{list(np.shape(leaf))}"

    rows = [(name, describe(saved.get(name)), describe(wanted.get(name))) for name in sorted({*saved, *wanted})]
    return [f"  {name}: saved {before}, wanted {now}" for name, before, now in rows if before != now]
