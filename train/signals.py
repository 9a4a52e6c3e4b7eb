"""Ctrl-C and SIGTERM, kept until the end of a step."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within `with Interrupts() as interrupts:` the first signal is only noted, a second ends the process at once.

    Python runs handlers between its own instructions alone, so not while the main thread compiles or computes in XLA.
    Signals are therefore also read by a thread of their own, which answers at once. One at a time, in the main thread.

    Attributes:
        received: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # The number of every signal that has a handler, by the one of C, which runs whatever Python does.
        self._woken = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
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
        os.close(self._write)
        self._watcher.join()
        os.close(self._read)

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


def _watch(pipe: int) -> None:
    """Answers signals until the other end of the pipe is closed."""
    seen = False
    while heard := os.read(pipe, 1):
        number = heard[0]
        if number not in _NUMBERS:  # one that somebody else has a handler for
            continue
        if seen:
            os._exit(128 + number)
        seen = True
        os.write(2, b"\nstopping after this step; once more quits at once\n")
