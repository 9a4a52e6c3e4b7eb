"""Handling of Ctrl-C and SIGTERM: the running step ends first, so that training can save a checkpoint."""

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Self

_NUMBERS, _END = (signal.SIGINT, signal.SIGTERM), b"\0"
_SAME = 0.5
"""Seconds within which two signals are one request."""


class Interrupts:
    """A context manager that only records the first signal; a second one ends the process at once.

    Python runs signal handlers only between its own instructions, so not while the main thread compiles or computes in
    XLA. Therefore a separate thread reads signals too, and answers at once. A signal within 0.5 seconds of the first
    counts as the same request: some job managers signal the process and then its group.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        # CPython's C handler writes the number of every handled signal here, even while the main thread is in XLA.
        self._woken = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=_watch, args=(self._read,), name="signals", daemon=True)
        self._watcher.start()
        for number in _NUMBERS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # a handler that was not set from Python cannot be restored
                signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._woken)
        self._write.send(_END)
        self._watcher.join()
        self._write.close()
        self._read.close()

    @property
    def name(self) -> str:
        """Name of the signal; SIGTERM if another process received it."""
        return (self.received or signal.SIGTERM).name

    def exit_code(self) -> int:
        """The exit code for a process ended by this signal, as shells expect it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.received or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = signal.Signals(number)


def _watch(wire: socket.socket) -> None:
    """Answers signals until the end marker arrives."""
    first = None
    while (heard := wire.recv(1)) != _END:
        number = heard[0]
        if number not in _NUMBERS:  # a signal that other code handles
            continue
        if first is None:
            first = time.monotonic()
            with contextlib.suppress(OSError):  # stderr may be closed
                os.write(2, b"\nstopping after this step; once more quits at once\n")
        elif time.monotonic() - first > _SAME:
            # Not sys.exit, which would only end this thread.
            os._exit(128 + number)
