"""One process trains in a run folder at a time.

The lock is advisory and on an open file, `.lock`, so that it ends with the process that holds it, whatever ends it.
The file itself stays; it says who held the lock last. Readers take no lock.
"""

import contextlib
import datetime
import json
import logging
import os
import socket
from pathlib import Path
from types import ModuleType
from typing import Self, TextIO

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
log = logging.getLogger(__name__)


class RunLock:
    """Holds a run folder for this process while the context lasts.

    Where the file system or the platform cannot lock, a warning says so and training goes on.

    Args:
        folder: the run folder; made if it is missing.

    Raises (when entered):
        ValueError: another process, or another lock of this one, holds the folder; the message says which.
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = (self._folder / NAME).open("a+", encoding="utf-8")
        except OSError as error:
            raise OSError(
                f"{self._folder} cannot be written to ({error.strerror}); make it writable, or give another folder "
                "with --run"
            ) from error
        try:
            self._acquire(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _acquire(self, file: TextIO) -> None:
        if fcntl is None:
            log.warning("%s cannot be locked on this platform: let no other process train there", self._folder)
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self._folder} is being trained by {_holder(file)}; wait until it ends, or give another folder with "
                "--run"
            ) from error
        except OSError as error:
            reason = error.strerror
            log.warning("%s cannot be locked (%s): let no other process train there", self._folder, reason)
            return
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        # Who the lock belongs to is only said; a full disk does not keep anybody from resuming.
        with contextlib.suppress(OSError):
            file.truncate(0)
            json.dump({"process": os.getpid(), "host": socket.gethostname(), "since": since}, file)
            file.flush()


def _holder(file: TextIO) -> str:
    """Who wrote the lock, as far as the file says it."""
    file.seek(0)
    try:
        row = json.load(file)
        return f"process {row['process']} on {row['host']} since {row['since']}"
    except (ValueError, TypeError, KeyError):  # it has only just been taken
        return "another process"
