"""Ctrl-C and SIGTERM, kept until the end of a step."""

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
    """Within `with Interrupts() as interrupts:` the first signal is only noted, a second ends the process at once.

    Python runs handlers between its own instructions alone, so not while the main thread compiles or computes in XLA.
    Signals are therefore also read by a thread of their own, which answers at once. What comes within half a second of
    the first is taken for the same request: some who stop a process signal it and then its group.

    Attributes:
        received: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        # The number of every signal that has a handler, by the one of C, which runs whatever Python does.
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
            if handler is not None:  # one that was not set by Python cannot be set again
                signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._woken)
        self._write.send(_END)
        self._watcher.join()
        self._write.close()
        self._read.close()

    @property
    def name(self) -> str:
        """Of the signal; SIGTERM where another process received it."""
        return (self.received or signal.SIGTERM).name

    def exit_code(self) -> int:
        """The code that shells expect of a process that this signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.received or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = signal.Signals(number)


def _watch(wire: socket.socket) -> None:
    """Answers signals until the end is said."""
    first = None
    while (heard := wire.recv(1)) != _END:
        number = heard[0]
        if number not in _NUMBERS:  # one that somebody else has a handler for
            continue
        if first is None:
            first = time.monotonic()
            with contextlib.suppress(OSError):  # nobody may be there to read it
                os.write(2, b"\nstopping after this step; once more quits at once\n")
        elif time.monotonic() - first > _SAME:
            os._exit(128 + number)
