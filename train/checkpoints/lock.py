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
from typing import Self

from filelock import FileLock, Timeout

NAME = ".lock"
log = logging.getLogger(__name__)


class RunLock:
    """Holds a run folder for this process while the context lasts.

    Where the file system cannot lock, a warning says so and training goes on.

    Args:
        folder: the run folder; made if it is missing.

    Raises (when entered):
        ValueError: another process, or another lock of this one, holds the folder; the message says which.
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # The library says neither who holds a lock nor what to do about it; its soft lock outlives a killed process.
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
            if error.filename is None:  # of a file that is open: only to lock it has failed
                reason = error.strerror
                log.warning("%s cannot be locked (%s): let no other process train there", self._folder, reason)
                return self
            raise OSError(
                f"{self._folder} cannot be written to ({error.strerror}); make it writable, or give another folder "
                "with --run"
            ) from error
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


def _sign(descriptor: int) -> None:
    """Writes who holds the lock into its file."""
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
    # Who the lock belongs to is only said; a full disk does not keep anybody from resuming.
    with contextlib.suppress(OSError):
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())


def _holder(file: Path) -> str:
    """Who wrote the lock, as far as the file says it."""
    try:
        row = json.loads(file.read_text("utf-8"))
        return f"process {row['process']} on {row['host']} since {row['since']}"
    except (OSError, ValueError, TypeError, KeyError):  # it has only just been taken
        return "another process"
