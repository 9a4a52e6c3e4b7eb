"""Folders of files that are made once from known facts, checked when they are opened, and made anew if damaged.

A folder holds `facts.json`, the files, and last of all the manifest of `train.checkpoints.digests`. Beside it, a folder
with the suffix `.work` holds locks and files that are being written. Locks are released by the system when their
process ends, however it ends, so that nothing waits for a dead process.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from seqattn.checks import check_integer
from train.checkpoints import digests

FACTS = "facts.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataCache:
    """The cache of large training files: texts and token ids on the disk, memory-mapped, read by all later runs."""

    folder: Path | None = None
    """Folder of the cache. None for seqattn/data in the user's cache folder. It may be removed at any time."""
    min_megabytes: int = 100
    """Cache the examples of files of this size together, in megabytes. Smaller ones are read into memory by each run,
    as are tasks without local files. 0 caches all files."""

    def __post_init__(self) -> None:
        check_integer("data_cache.min_megabytes", self.min_megabytes, 0)


class CacheFolder:
    """A folder that can be made again at any time from what its facts describe.

    Args:
        path: the folder; it may be missing. Everything in it may be removed.
        facts: JSON values that describe what the files are made from. A folder with other facts is foreign.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self._facts = path, json.dumps(facts, indent=1, sort_keys=True).encode()
        self._own = ""  # the name of a work folder for this process alone, where the file system cannot lock

    def is_whole(self) -> bool:
        """Whether every file is there and intact. Reads all of them.

        A damaged or foreign folder is removed, and one warning says why.
        """
        if not self._is_written():
            return False
        if (wrong := self._wrong()) is None:
            return True
        # Another process may have found the damage first, and may already be writing the files again.
        with self.claim("folder"):
            if self._is_written() and (wrong := self._wrong()) is not None:
                self._remove(wrong)
        return False

    def begin(self) -> None:
        """Prepares the folder for its files; keeps those of an interrupted process if they have the same facts."""
        with self.claim("folder"):
            kept = self.path / FACTS
            if kept.is_file() and kept.read_bytes() == self._facts:
                return
            # An empty folder is what a process leaves that is killed in the next lines.
            if self.path.exists() and any(self.path.iterdir()):
                self._remove("it was made from something else")
            self.path.mkdir(parents=True, exist_ok=True)
            fresh = self.work / FACTS
            fresh.write_bytes(self._facts)
            self.add(fresh, FACTS)

    def finish(self) -> None:
        """Writes the manifest, which makes the folder whole. Any of the processes that wrote files may do it."""
        with self.claim("folder"):
            if not self._is_written():
                digests.write(self.path)

    @property
    def work(self) -> Path:
        """The folder for files until they are whole."""
        return self._locks / self._own

    @property
    def _locks(self) -> Path:
        return self.path.with_name(self.path.name + ".work")

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Describes an error of writing to this folder in one sentence, with a remedy.

        Args:
            what: what is written, for the message.
        """
        try:
            yield
        except OSError as error:
            if error.errno is None or not (error.errno in _FULL if error.filename is None else self._is_here(error)):
                raise
            raise OSError(
                f"{self.path}: {what} cannot be written ({os.strerror(error.errno)}); free some space, or give another "
                "folder with --data-cache.folder"
            ) from error

    def add(self, file: Path, name: str) -> None:
        """Moves a file from `work` into the folder once it is safely on the disk."""
        digests.flush(file)
        file.replace(self.path / name)
        digests.flush(self.path)

    @contextlib.contextmanager
    def claim(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Holds a lock of this folder.

        Args:
            name: the name of the lock.
            wait: if True, waits until another process releases it.

        Yields:
            Whether the lock is held. Without `wait` it is False if another process holds it.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._locks / f"{name}.lock", timeout=-1 if wait else 0, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        except OSError as error:
            if error.filename is not None:  # the file could not be opened
                raise
            # The file system cannot lock. Two processes may then make the same file, each under names of its own until
            # it is whole, and the last one stays.
            if not self._own:
                log.warning("%s cannot be locked (%s): each process makes all files", self._locks, error.strerror)
                self._own = uuid.uuid4().hex
                self.work.mkdir()
        try:
            yield True
        finally:
            lock.release()

    def _is_here(self, error: OSError) -> bool:
        """Whether an error is about this folder or one above it, and not about a file elsewhere, such as a text."""
        file = Path(os.fsdecode(error.filename))
        return self.path.parent in file.parents or file in self.path.parents

    def _is_written(self) -> bool:
        return (self.path / digests.MANIFEST).exists()

    def _wrong(self) -> str | None:
        wrong = digests.damage(self.path)
        if wrong is None and (self.path / FACTS).read_bytes() != self._facts:
            wrong = "it was made from something else"
        return wrong

    def _remove(self, wrong: str) -> None:
        log.warning("%s: %s; it is made anew", self.path, wrong)
        # The manifest goes first: a process that is killed here leaves an unfinished folder, not a damaged one.
        (self.path / digests.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.path)


def default_folder() -> Path:
    """Returns the folder of caches: seqattn/data in the user's cache folder.

    Raises:
        ValueError: the user has no home folder.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise ValueError(f"--data-cache.folder must be set: {error}") from error
    return base / "seqattn" / "data"
