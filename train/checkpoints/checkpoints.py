"""Checkpoints of a run: parameters, optimizer, step, resolved config and tokenizer, by Orbax.

    checkpoints/1200/              the state after 1200 updates, as Orbax commits it, with the texts as its metadata
    checkpoints/1200/digests.json  the sha256 of each of its files: a step counts if all are as they were written

What else may be there, and why a process may be killed at any moment, says `train.checkpoints.folders`.
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
_OS_ERROR = re.compile(r"os_error_code='([0-9]+)'")  # in what TensorStore raises, which is a ValueError


class MissingStep(FileNotFoundError):
    """There is no such step: it was never saved, or the process that trains has removed it, maybe while it was read."""


class Checkpoints:
    """The checkpoints of a run, a folder for each step; the latest few are kept.

    Steps are written in the background; every method waits until the last one is. What counts are the steps that
    verify: each is read and compared with its digests once, and anew after `read_again`. Nothing is written or removed
    before the first `save`, so that others may read a run while it is trained. Close it: what is being written when
    Python ends is lost.

    With several processes (`jax.distributed`) each calls the same methods in the same order: every process writes its
    part of the arrays, process 0 all the rest, and process 0 decides which steps there are.

    Args:
        folder: where the steps are; made if it is missing.
        keep: how many of the latest regular steps stay.
        is_regular: whether a step would have been saved without an interruption; others stay while they are the newest.

    Raises:
        ValueError: keep is below 1.
        OSError: the folder cannot be made.
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
        """The newest step that verifies, None where there is none; newer ones that do not are named in a warning."""
        return next(iter(self._verified(1)), None)

    @property
    def steps(self) -> list[int]:
        """All steps that verify, oldest first; those that do not are named in a warning."""
        return sorted(self._verified(None))

    def save(self, state: TrainState, texts: dict[str, str]) -> None:
        """Writes a step with texts (resolved config, tokenizer, digest of the data); a step already there stays.

        Returns when the state is copied: its buffers may be given away. The writing goes on in the background.

        Raises:
            OSError: the save before this one failed, and this call saved nothing: it may be made again.
            ValueError: leaves of the state hold no numbers, or their names cannot be told apart, or be those of files.
        """
        self.wait()
        step, leaves = int(state.step), _named(state)
        empty = [name for name, leaf in leaves.items() if leaf.size == 0]
        if empty:  # it would raise, and leave a thread that keeps Python from ending
            raise ValueError(f"Orbax saves no arrays without numbers, and these are: {', '.join(empty)}")
        if self._has(step):
            return
        if is_first():
            self._folders.sweep()
        (attempt,) = agreed_numbers([secrets.randbits(31)])
        folder = self._folders.saving(step, attempt)
        begin: Callable[[], Any] = functools.partial(_begin, folder, _copied(leaves), texts)
        if jax.process_count() > 1:
            # Processes that write together agree on it by collectives, which must not come between those of training.
            try:
                written = begin()
            except (OSError, ValueError) as error:
                raise self._failure(step, error) from error
            begin = lambda: written  # noqa: E731
        self._saving = step, self._background.submit(self._finish, step, folder, begin)

    def wait(self) -> None:
        """Returns when the last save is on disk with its digests.

        Raises:
            OSError: it failed; the message says why and what to do. Older steps stay, and the step may be saved again.
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
        """The texts of a step, by default of the latest.

        Raises:
            MissingStep: there is no such step, or it does not verify.
        """
        return self._read(self._resolve(step), ocp.checkpointables_metadata).custom_metadata or {}

    def read_again(self) -> None:
        """What is asked next is answered by the files of now: any of them may have been damaged since it was read."""
        self.wait()
        self._folders.forget_verdicts()

    def protect(self, *steps: int) -> None:
        """From now on these steps stay too, however many come after them; others that were protected no longer."""
        self._protected = frozenset(steps)

    def forget_after(self, step: int) -> None:
        """Removes all later steps.

        Raises:
            ValueError: the step is not there, or does not verify, so nothing might be left.
        """
        self.wait()
        if not self._has(step):
            raise ValueError(f"{self.folder} holds no step {step}, so the later ones stay")
        if is_first():
            self._folders.remove_after(step)
        any_process(False)  # all go on together

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """A state, by default the latest; `like` gives its structure, and where its arrays lie.

        `like` may hold shapes in place of arrays (`jax.ShapeDtypeStruct` with a sharding). What is to be on several
        devices is read onto them, on however many it was when it was saved. The numbers are the same bitwise; what is
        computed from them on another number of devices need not be.

        Raises:
            ValueError: names, shapes or dtypes differ; the message lists which.
            MissingStep: there is no such step, or it does not verify.
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
        """Waits for the last save; nothing can be saved afterwards.

        Raises:
            OSError: that save failed.
        """
        try:
            self.wait()
        finally:
            self._background.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and jax.process_count() > 1:
            self._background.shutdown()  # the others are elsewhere and cannot be asked
        else:
            self.close()

    def _finish(self, step: int, folder: Path, begin: Callable[[], Any]) -> None:
        """What is done of a save in the background."""
        try:
            begin().result()
            if is_first():
                self._folders.add(step, folder)
                self._folders.prune(self._keep, self._protected, self._is_regular)
        except Exception as error:
            if is_first():  # gives its space back
                self._folders.sweep()
            if isinstance(error, RuntimeError):  # Python ends before it was closed, and nobody will ask
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
        # What is removed is renamed first; Orbax may find half of it, and say nothing.
        if not exists(path):
            raise MissingStep(f"{path} was removed while it was read; try again") from reason
        return found

    def _failure(self, step: int, error: BaseException) -> OSError:
        whole = sorted(self._folders.newest()) if is_first() else []
        kept = f"steps {', '.join(map(str, whole))} stay" if whole else "no older step is lost"
        code, named = getattr(error, "errno", None), _OS_ERROR.search(str(error))
        code = int(named[1]) if code is None and named else code
        reason = str(error) or type(error).__name__ if code is None else os.strerror(code)
        advice = "free some space" if code in _FULL else "make it writable" if code in _CLOSED else "mend that"
        return OSError(f"{self.folder}: step {step} could not be saved ({reason}); {kept}; {advice}, then go on")


def _begin(folder: Path, leaves: dict[str, Any], texts: dict[str, str]) -> Any:
    """Has Orbax write, which takes some 0.3 ms a leaf before it returns."""
    with _context():
        return ocp.save_checkpointables_async(folder, {"state": leaves}, custom_metadata=texts)


def _context() -> ocp.Context:
    context = ocp.Context()
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    # Otherwise the threads that wait for a folder which cannot be made keep Python from ending.
    context.asynchronous.create_directories_asynchronously = False
    return context


def agreed_numbers(numbers: list[int]) -> list[int]:
    """The numbers of process 0, in all processes; all must ask."""
    if jax.process_count() == 1:
        return numbers
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.resize(np.array([*numbers, 0], np.int32), count)
    return [int(number) for number in multihost_utils.broadcast_one_to_all(mine)]


def _copied(leaves: dict[str, Any]) -> dict[str, Any]:
    """On the host what this process has as a whole, so that later updates do not touch it; the rest as it is."""
    whole = {name: leaf for name, leaf in leaves.items() if getattr(leaf, "is_fully_addressable", True)}
    return leaves | jax.device_get(whole)


def _place(leaf: Any) -> Any:
    """What Orbax reads a leaf as: an array on the devices where its like lies, or one of NumPy."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves of a state by flat names: the keys on their paths, joined by '-'.

    Raises:
        ValueError: a name cannot be that of a file, or is that of another leaf too.
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
            raise ValueError(f"the leaf {keys} cannot be saved: another one has its name, {name!r}")
        names[name] = None
    return tuple(names)


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    def describe(leaf: Any) -> str:
        return "missing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"

    rows = [(name, describe(saved.get(name)), describe(wanted.get(name))) for name in sorted({*saved, *wanted})]
    return [f"  {name}: saved {before}, wanted {now}" for name, before, now in rows if before != now]
