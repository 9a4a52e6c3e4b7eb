"""Ctrl-C and SIGTERM, kept until the end of a step."""

import os
import signal
from types import FrameType, TracebackType
from typing import Self


class Interrupts:
    """Within `with Interrupts() as interrupts:` the first signal is only noted, a second ends the process at once.

    Attributes:
        received: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # one that was not set by Python cannot be set again
                signal.signal(number, handler)  # type: ignore[arg-type]

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
        # Not print: a handler may run in the middle of another one.
        os.write(2, b"\nstopping after this step; once more quits at once\n")
        signal.signal(number, signal.SIG_DFL)
