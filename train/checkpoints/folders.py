"""The numbered folders of checkpoints: verification, retention and cleaning up.

::

    1200/           a complete checkpoint; it is valid if all files match their digests (digests.py)
    .saving-1300-7/ a checkpoint being written, by attempt 7; it is renamed to its step at the end
    .removed-900/   a checkpoint being removed
    damaged-1200/   the former folder 1200, moved aside when step 1200 was saved again

A process may be killed at any moment: a numbered folder is always complete, unless something else damages it.
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
    """The checkpoints in a folder, one subfolder for each step.

    Each step is verified against its digests once, and again after `forget_verdicts`.

    Args:
        folder: the folder of checkpoints; created if it is missing. Only the methods that say so write or remove files.

    Raises:
        OSError: the folder cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._damage: dict[int, str | None] = {}
        self._said: set[int] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"{folder} cannot be created ({error.strerror}); make its parent folder writable, or give another "
                "folder with --run"
            ) from error

    def path(self, step: int) -> Path:
        """The folder of a step, whether it exists or not."""
        return self.folder / str(step)

    def saving(self, step: int, attempt: int) -> Path:
        """The temporary folder in which an attempt writes a step.

        Each attempt has its own: threads of a failed attempt may still write while the next one runs.
        """
        return self.folder / f".saving-{step}-{attempt}"

    def has(self, step: int) -> bool:
        """Whether a step exists and is valid."""
        return exists(self.path(step)) and self._damage_of(step) is None

    def newest(self, count: int | None = None) -> list[int]:
        """The newest `count` valid steps, newest first; all by default. Logs each newer damaged step once."""
        found: list[int] = []
        passed: list[int] = []
        for step in self._listed():
            if len(found) == count:
                break
            if self._damage_of(step) is None:
                found.append(step)
            elif not exists(self.path(step)):  # the training process removed it while this one read it
                del self._damage[step]
            elif step not in self._said:
                passed.append(step)
        for step in passed:
            older = max((whole for whole in found if whole < step), default=None)
            onward = "there is no older one" if older is None else f"using step {older}"
            log.warning("%s: step %d is damaged (%s): %s", self.folder, step, self._damage[step], onward)
        self._said.update(passed)
        return found

    def add(self, step: int, fresh: Path) -> None:
        """Completes a step: writes digests to its temporary folder and renames it.

        An existing folder of this step is moved aside.

        Args:
            step: the step.
            fresh: the temporary folder, as from `saving`.

        Raises:
            OSError: the files cannot be read back, or the folder cannot be renamed.
            ValueError: the folder holds something other than files and folders.
        """
        path, aside = self.path(step), self.folder / f"damaged-{step}"
        # Before the rename: a numbered folder without digests would count as damaged.
        digests.write(fresh)
        if exists(path):
            _delete(aside)
            path.rename(aside)
            log.warning("%s: step %d is saved again; its former folder is now %s", self.folder, step, aside.name)
        fresh.rename(path)
        digests.flush(self.folder)
        self._damage[step] = None

    def forget_verdicts(self) -> None:
        """Forgets which steps are valid, so that each is verified again when it is next needed."""
        self._damage.clear()

    def prune(
        self, keep: int, protected: Collection[int], is_regular: Callable[[int], bool] = lambda step: True
    ) -> None:
        """Removes old steps.

        Keeps the newest valid step, the newest `keep` valid regular steps, and protected steps. A damaged step stays
        too, unless it is older than all of these.

        Args:
            keep: the number of regular steps to keep.
            protected: steps to keep in any case.
            is_regular: tells whether an uninterrupted run would have saved a step.
        """
        whole = self.newest()
        kept = {*whole[:1], *[step for step in whole if is_regular(step)][:keep]}
        for step in self._listed():
            if step not in protected and step not in kept and (step in whole or step < min(kept, default=0)):
                self._remove(step)

    def remove_after(self, step: int) -> None:
        """Removes all steps after this one."""
        for later in self._listed():
            if later > step:
                self._remove(later)

    def sweep(self) -> None:
        """Removes the unfinished folders of killed processes and failed saves."""
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
        if path.is_symlink() or not (path / digests.MANIFEST).is_file():  # not a folder that this class wrote
            return
        self._damage.pop(step, None)
        removed = self.folder / f".removed-{step}"
        _delete(removed)
        try:
            # Renamed first: a half-removed folder must not count as a checkpoint.
            path.rename(removed)
        except OSError as error:
            log.warning("%s cannot be removed (%s)", path, error)
        else:
            _delete(removed)


def exists(path: Path) -> bool:
    """Whether a path exists in any form, including a broken symbolic link."""
    return os.path.lexists(path)


def _delete(path: Path) -> None:
    """Removes a file or folder if it exists; logs a warning if that fails."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed (%s)", path, error)
