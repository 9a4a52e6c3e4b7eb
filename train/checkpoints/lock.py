"""A lock on run folders, so that only one process trains in a folder at a time.

The lock is advisory and held on an open file, `.lock`. The system releases it when the process ends, however it ends.
The file stays and names the last holder. Readers take no lock.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

NAME = ".lock"
log = logging.getLogger(__name__)


class RunLock:
    """A context manager that locks a run folder for this process.

    If the file system cannot lock, it logs a warning and training continues.

    Args:
        folder: the run folder; created if it is missing.

    Raises:
        ValueError: on entry, another process, or another lock in this process, holds the folder; the message names it.
        OSError: on entry, the folder cannot be created or written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # No fallback: the soft lock of the library survives a killed process. `_sign` records the holder, which the
        # library does not name.
        self._lock = FileLock(
            folder / NAME, timeout=0, preserve_lock_file=True, fallback_to_soft=False, on_acquired=_sign
        )

    def __enter__(self) -> Self:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"{self._folder} is being trained by {_holder(self._folder / NAME)}; wait until it ends, or give "
                "another folder with --run"
            ) from error
        except OSError as error:
            if error.filename is None:  # the file could be opened; only the lock failed
                reason = error.strerror
                log.warning("%s cannot be locked (%s): do not let another process train there", self._folder, reason)
                return self
            raise OSError(f"{_refusal(self._folder, error)}, or give another folder with --run") from error
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


def _sign(descriptor: int) -> None:
    """Writes the holder of the lock into the lock file."""
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
    # The record is only informative: a full disk must not prevent training from resuming.
    with contextlib.suppress(OSError):
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())


def _refusal(folder: Path, error: OSError) -> str:
    """Describes why the lock file could not be opened, with a remedy."""
    file, code = folder / NAME, error.errno or 0
    if code == errno.ELOOP and file.is_symlink():
        return f"{file} is a symbolic link, which a lock must not follow: remove the link"
    if error.strerror == os.strerror(code):
        return f"{folder} cannot be written to ({error.strerror}); make it writable"
    # The library refuses files that another user could have planted, and says why before the semicolon.
    reason = str(error.strerror).partition(";")[0]
    return f"{file} cannot be locked ({reason}): remove it while no process trains there"


def _holder(file: Path) -> str:
    """Describes the holder of the lock, as far as the file names it."""
    try:
        row = json.loads(file.read_text("utf-8"))
        return f"process {row['process']} on {row['host']} since {row['since']}"
    except (OSError, ValueError, TypeError, KeyError):  # the holder has not written its record yet
        return "another process"
