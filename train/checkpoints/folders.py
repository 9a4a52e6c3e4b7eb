"""The numbered folders of checkpoints: which of them count, which stay, and what is in the way.

    1200/           written as a whole; it counts if each of its files is as its digests say (digests.py)
    .saving-1300-7/ being written, in the attempt of that number; it gets the number of its step last
    .removed-900/   being removed
    damaged-1200/   stood where step 1200 was written again

So a process may be killed at any moment: a numbered folder is whole, or was damaged by something else.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from train.checkpoints import digests

log = logging.getLogger(__name__)

_STEP, _UNFINISHED = re.compile(r"0|[1-9][0-9]*"), re.compile(r"\.(saving|removed)(-[0-9]+)+")


class StepFolders:
    """The steps in a folder; each is read and compared with its digests once, but for `forget_verdicts`.

    Args:
        folder: where the steps are; made if it is missing. Nothing else is written or removed unless a method says so.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._damage: dict[int, str | None] = {}
        self._said: set[int] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"{folder} cannot be made ({error.strerror}); make the folder above it writable, or give another one "
                "with --run"
            ) from error

    def path(self, step: int) -> Path:
        """Where a step is, or would be."""
        return self.folder / str(step)

    def saving(self, step: int, attempt: int) -> Path:
        """Where a step is written before it counts; what a failed attempt goes on to write must not meet the next."""
        return self.folder / f".saving-{step}-{attempt}"

    def has(self, step: int) -> bool:
        """Whether a step is there and verifies."""
        return exists(self.path(step)) and self._damage_of(step) is None

    def newest(self, count: int | None = None) -> list[int]:
        """So many steps that verify, or all, newest first; newer ones that do not are named in a warning, once."""
        found: list[int] = []
        passed: list[int] = []
        for step in self._listed():
            if len(found) == count:
                break
            if self._damage_of(step) is None:
                found.append(step)
            elif not exists(self.path(step)):  # the process that trains removed it while it was read here
                del self._damage[step]
            elif step not in self._said:
                passed.append(step)
        for step in passed:
            older = max((whole for whole in found if whole < step), default=None)
            onward = "there is no older one" if older is None else f"going on from step {older}"
            log.warning("%s: step %d is damaged (%s): %s", self.folder, step, self._damage[step], onward)
        self._said.update(passed)
        return found

    def add(self, step: int, fresh: Path) -> None:
        """Gives a step that was written to a folder its digests and its number; what has this number is moved away.

        Raises:
            OSError: it cannot be read back, or not be given its number.
            ValueError: it holds something that is neither a file nor a folder.
        """
        path, aside = self.path(step), self.folder / f"damaged-{step}"
        digests.write(fresh)
        if exists(path):
            _delete(aside)
            path.rename(aside)
            log.warning("%s: step %d is saved again; what was there before is in %s", self.folder, step, aside.name)
        fresh.rename(path)
        digests.flush(self.folder)
        self._damage[step] = None

    def forget_verdicts(self) -> None:
        """Has all steps read and compared with their digests anew, when they are asked for."""
        self._damage.clear()

    def prune(
        self, keep: int, protected: Collection[int], is_regular: Callable[[int], bool] = lambda step: True
    ) -> None:
        """Removes steps but for the newest of all, the newest regular ones, so many, that verify, and protected ones.

        What does not verify stays, unless it is older than all of these.
        """
        whole = self.newest()
        kept = {*whole[:1], *[step for step in whole if is_regular(step)][:keep]}
        for step in self._listed():
            if step not in protected and step not in kept and (step in whole or step < min(kept, default=0)):
                self._remove(step)

    def remove_after(self, step: int) -> None:
        """Removes all later steps."""
        for later in self._listed():
            if later > step:
                self._remove(later)

    def sweep(self) -> None:
        """Removes what a killed process, or a failure, left unfinished."""
        for path in self.folder.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                _delete(path)

    def _listed(self) -> list[int]:
        """What has the name of a step, newest first."""
        return sorted((int(path.name) for path in self.folder.iterdir() if _STEP.fullmatch(path.name)), reverse=True)

    def _damage_of(self, step: int) -> str | None:
        if step not in self._damage:
            self._damage[step] = digests.damage(self.path(step))
        return self._damage[step]

    def _remove(self, step: int) -> None:
        path = self.path(step)
        if path.is_symlink() or not (path / digests.MANIFEST).is_file():  # whatever it is, it is not ours
            return
        self._damage.pop(step, None)
        removed = self.folder / f".removed-{step}"
        _delete(removed)
        try:
            # Moved away first: a step that is half removed must not count as one.
            path.rename(removed)
        except OSError as error:
            log.warning("%s cannot be removed (%s)", path, error)
        else:
            _delete(removed)


def exists(path: Path) -> bool:
    """Whether anything has this name, be it a symbolic link to nothing."""
    return os.path.lexists(path)


def _delete(path: Path) -> None:
    """Removes whatever has this name, if anything has; where it cannot, a warning says so."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed (%s)", path, error)
