"""Checkpoints of a run, written by Orbax: parameters, optimizer state, step, resolved config and tokenizer.

::

    checkpoints/1200/              the state after 1200 updates, as Orbax commits it, with the texts as its metadata
    checkpoints/1200/digests.json  the SHA-256 of each file; a step is valid if all of them match

`train.checkpoints.folders` describes the other folders there, and why a process may be killed at any moment.
"""

import errno
import functools
import logging
import os
import re
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from seqattn.checks import check_integer
from train.checkpoints.folders import StepFolders, exists
from train.devices.processes import any_process, is_first
from train.update.step import TrainState

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_OS_ERROR = re.compile(r"os_error_code='([0-9]+)'")  # in the message of TensorStore, which raises ValueError


class MissingStep(FileNotFoundError):
    """Raised if a step does not exist: it was never saved, or the training process removed it, maybe during a read."""


class Checkpoints:
    """The checkpoints of a run, one folder for each step; keeps the latest few. A context manager.

    Steps are written in the background; every method waits for the last save first. Only valid steps count: each is
    verified against its digests once, and again after `read_again`. Nothing is written or removed before the first
    `save`, so others may read a run while it trains. Must be closed: a save that is still running when Python exits is
    lost.

    With several processes (`jax.distributed`), each must call the same methods in the same order. Every process writes
    its part of the arrays. Process 0 writes everything else and decides which steps are valid.

    Args:
        folder: the folder of checkpoints; created if it is missing.
        keep: the number of latest regular steps to keep.
        is_regular: tells whether an uninterrupted run would have saved a step. Other steps are kept only while they are
            the newest.

    Raises:
        ValueError: `keep` is below 1.
        OSError: the folder cannot be created.
    """

    def __init__(self, folder: Path, *, keep: int = 2, is_regular: Callable[[int], bool] = lambda step: True) -> None:
        check_integer("keep", keep, 1)
        self._folders, self._keep, self._is_regular = StepFolders(folder), keep, is_regular
        self.folder = self._folders.folder
        self._protected: frozenset[int] = frozenset()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None

    @property
    def latest(self) -> int | None:
        """The newest valid step; None if there is none. Logs newer damaged steps."""
        return next(iter(self._verified(1)), None)

    @property
    def steps(self) -> list[int]:
        """All valid steps, oldest first. Logs damaged steps."""
        return sorted(self._verified(None))

    def save(self, state: TrainState, texts: dict[str, str]) -> None:
        """Saves a state in the background, unless its step is saved already.

        Returns as soon as the state is copied; its buffers may then be donated.

        Args:
            state: the state; `state.step` names the checkpoint.
            texts: texts to save with it, by name: resolved config, tokenizer, digest of the data.

        Raises:
            OSError: the previous save failed. This call saved nothing and may be repeated.
            ValueError: a leaf of the state is empty, or the names of leaves are not unique or not valid file names.
        """
        self.wait()
        step, leaves = int(state.step), _named(state)
        empty = [name for name, leaf in leaves.items() if leaf.size == 0]
        if empty:  # Orbax would raise and leave a thread that keeps Python from exiting
            raise ValueError(f"Orbax cannot save empty arrays: {', '.join(empty)}")
        if self._has(step):
            return
        if is_first():
            self._folders.sweep()
        (attempt,) = agreed_numbers([secrets.randbits(31)])
        folder = self._folders.saving(step, attempt)
        begin: Callable[[], Any] = functools.partial(_begin, folder, _copied(leaves), texts)
        if jax.process_count() > 1:
            # Orbax coordinates processes with collectives, which must not interleave with those of training.
            try:
                written = begin()
            except (OSError, ValueError) as error:
                raise self._failure(step, error) from error
            begin = lambda: written  # noqa: E731
        self._saving = step, self._background.submit(self._finish, step, folder, begin)

    def wait(self) -> None:
        """Waits until the last save is on disk with its digests.

        Raises:
            OSError: the save failed; the message gives the reason and a remedy. Older steps are kept, and the step may
                be saved again.
        """
        if self._saving is None:
            return
        step, future = self._saving
        error = future.exception()
        self._saving = None
        if any_process(error is not None):
            error = error or OSError("another process failed")
            raise self._failure(step, error) from error

    def texts(self, step: int | None = None) -> dict[str, str]:
        """Reads the texts of a step, by default the latest.

        Raises:
            MissingStep: the step does not exist or is damaged.
        """
        return self._read(self._resolve(step), ocp.checkpointables_metadata).custom_metadata or {}

    def read_again(self) -> None:
        """Verifies every step again when it is next needed, since files may have been damaged since the last time."""
        self.wait()
        self._folders.forget_verdicts()

    def protect(self, *steps: int) -> None:
        """Keeps these steps from removal, however many follow. Replaces the steps of earlier calls."""
        self._protected = frozenset(steps)

    def forget_after(self, step: int) -> None:
        """Removes all steps after this one.

        Raises:
            ValueError: the step does not exist or is damaged. Nothing is removed, since no valid step might be left.
        """
        self.wait()
        if not self._has(step):
            raise ValueError(f"{self.folder} holds no step {step}, so later ones are kept")
        if is_first():
            self._folders.remove_after(step)
        any_process(False)  # a barrier: no process may look before the steps are removed

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Restores a state, bitwise as it was saved.

        The number of devices may differ from that of the saving run. Computations on another number of devices need not
        be bitwise the same.

        Args:
            like: gives the structure, shapes, dtypes and shardings. It may hold `jax.ShapeDtypeStruct` with a sharding
                in place of arrays. An array over several devices is read directly onto them.
            step: the step, by default the latest.

        Raises:
            ValueError: names, shapes or dtypes differ; the message lists the differences.
            MissingStep: the step does not exist or is damaged.
        """
        step, wanted = self._resolve(step), _named(like)
        saved = self._read(step, ocp.checkpointables_metadata).metadata["state"]
        wrong = _differences(saved, wanted)
        if wrong:
            raise ValueError(f"{self._folders.path(step)} does not fit this model:\n" + "\n".join(wrong))
        places = {name: _place(leaf) for name, leaf in wanted.items()}
        loaded = self._read(step, lambda path: ocp.load_checkpointables(path, {"state": places}))["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [jax.numpy.asarray(loaded[name]) for name in wanted])

    def close(self) -> None:
        """Waits for the last save. Nothing can be saved afterwards.

        Raises:
            OSError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._background.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and jax.process_count() > 1:
            self._background.shutdown()  # no agreement: the other processes may not have failed and run other code
        else:
            self.close()

    def _finish(self, step: int, folder: Path, begin: Callable[[], Any]) -> None:
        """The part of a save that runs in the background."""
        try:
            begin().result()
            if is_first():
                self._folders.add(step, folder)
                self._folders.prune(self._keep, self._protected, self._is_regular)
        except Exception as error:
            if is_first():  # frees the disk space of the failed save
                self._folders.sweep()
            if isinstance(error, RuntimeError):  # Python exits before `close`, so no caller will see the error
                log.error("%s", self._failure(step, error))
            raise

    def _has(self, step: int) -> bool:
        return bool(agreed_numbers([int(is_first() and self._folders.has(step))])[0])

    def _verified(self, count: int | None) -> list[int]:
        self.wait()
        return agreed_numbers(self._folders.newest(count) if is_first() else [])

    def _resolve(self, step: int | None) -> int:
        self.wait()
        found = self.latest if step is None else step if self._has(step) else None
        if found is None:
            raise MissingStep(f"{self.folder} holds no checkpoint" + ("" if step is None else f" of step {step}"))
        return found

    def _read(self, step: int, read: Callable[[Path], Any]) -> Any:
        path, reason = self._folders.path(step), None
        try:
            with _context():
                found = read(path)
        except Exception as error:
            if exists(path):
                raise
            reason = error
        # The training process may have removed the step during the read. Orbax may then return a part without an error.
        if not exists(path):
            raise MissingStep(f"{path} was removed while it was read; try again") from reason
        return found

    def _failure(self, step: int, error: BaseException) -> OSError:
        whole = sorted(self._folders.newest()) if is_first() else []
        kept = f"steps {', '.join(map(str, whole))} are kept" if whole else "no older step is lost"
        code, named = getattr(error, "errno", None), _OS_ERROR.search(str(error))
        code = int(named[1]) if code is None and named else code
        reason = str(error) or type(error).__name__ if code is None else os.strerror(code)
        advice = "free some space" if code in _FULL else "make it writable" if code in _CLOSED else "fix that"
        return OSError(f"{self.folder}: step {step} could not be saved ({reason}); {kept}; {advice}, then resume")


def _begin(folder: Path, leaves: dict[str, Any], texts: dict[str, str]) -> Any:
    """Starts an asynchronous save by Orbax, which takes about 0.3 ms per leaf before it returns."""
    with _context():
        return ocp.save_checkpointables_async(folder, {"state": leaves}, custom_metadata=texts)


def _context() -> ocp.Context:
    context = ocp.Context()
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    # If a folder cannot be created, asynchronous creation leaves waiting threads that keep Python from exiting.
    context.asynchronous.create_directories_asynchronously = False
    return context


def agreed_numbers(numbers: list[int]) -> list[int]:
    """Returns the numbers of process 0 in every process. All processes must call it."""
    if jax.process_count() == 1:
        return numbers
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.resize(np.array([*numbers, 0], np.int32), count)
    return [int(number) for number in multihost_utils.broadcast_one_to_all(mine)]


def _copied(leaves: dict[str, Any]) -> dict[str, Any]:
    """Copies to the host the arrays that this process holds completely; leaves the others as they are."""
    # The next update is donated the buffers on the devices while the background thread still writes.
    whole = {name: leaf for name, leaf in leaves.items() if getattr(leaf, "is_fully_addressable", True)}
    return leaves | jax.device_get(whole)


def _place(leaf: Any) -> Any:
    """The target of Orbax for a leaf: an array over the same devices, or a NumPy array for a single device."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves of a state by flat names: the keys on their paths, joined by '-'.

    Raises:
        ValueError: a name is not a valid file name, or two leaves have the same name.
    """
    return dict(zip(_names(jax.tree.structure(state)), jax.tree.leaves(state), strict=True))


@functools.lru_cache(maxsize=8)
def _names(structure: Any) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(structure, range(structure.num_leaves))):
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if any(not key or set(key) & set("./\\") for key in keys):
            raise ValueError(
                f"the leaf {keys} cannot be saved: a key must not be empty or hold '.', '/' or a backslash"
            )
        if (name := "-".join(keys)) in names:
            raise ValueError(f"the leaf {keys} cannot be saved: another leaf has the same name, {name!r}")
        names[name] = None
    return tuple(names)


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """A line for each leaf whose shape or dtype differs, or that one of both states lacks."""

    def describe(leaf: Any) -> str:
        return "missing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"

    rows = [(name, describe(saved.get(name)), describe(wanted.get(name))) for name in sorted({*saved, *wanted})]
    return [f"  {name}: saved {before}, wanted {now}" for name, before, now in rows if before != now]
