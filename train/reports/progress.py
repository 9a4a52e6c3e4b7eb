"""Progress display: a bar on a terminal, plain lines elsewhere."""

import io
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self, TextIO

import rich.console
import rich.progress
import rich.text


class Progress:
    """A context manager that shows progress: a bar on a terminal, plain lines elsewhere.

    The remaining time is estimated from at most 1000 latest steps of this session, without its first one. So neither
    steps before a resume nor the first compilation count.

    Args:
        total: number of steps in the whole run.
        what: what is counted, as the first word of a plain line.
        initial_step: number of steps done before this session.
        seconds: minimum time between two plain lines, in seconds.
        stream: the output stream, by default standard output. Characters outside its encoding are escaped from now on.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        what: str = "step",
        initial_step: int = 0,
        seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._what, self._seconds, self._clock = total, what, seconds, clock
        self._stream = sys.stdout if stream is None else stream
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")
        self._printed = -math.inf
        self._metrics: dict[str, float] = {}
        self._is_bar = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._bar = _bar(self._stream, clock)
        self._task = self._bar.add_task("", total=total, completed=initial_step, text="")

    def update(self, step: int, **metrics: float) -> None:
        """Shows that `step` steps are done.

        Args:
            step: number of steps done.
            metrics: Python numbers to show. A metric that is not given keeps its last value.
        """
        now = self._clock()
        self._metrics |= metrics
        text = "  ".join(map(_show, self._metrics.items()))
        self._bar.update(self._task, completed=step, text=text)
        if not self._is_bar and (now - self._printed >= self._seconds or step == self._total):
            self._printed = now
            eta = f"ETA {_duration(self._bar.tasks[0].time_remaining)}"
            self.print("  ".join(filter(None, [f"{self._what} {step}/{self._total}", text, eta])))

    def print(self, text: str) -> None:
        """Prints lines, above the bar if there is one."""
        if self._is_bar:
            self._bar.console.print(rich.text.Text(text), soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        if self._is_bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_bar:
            self._bar.stop()


def _bar(stream: TextIO, clock: Callable[[], float]) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.completed}/{task.total}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TextColumn("{task.fields[text]}  ETA", markup=False),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(file=stream),
        get_time=clock,
        speed_estimate_period=math.inf,  # an update may take longer than its 30 seconds
        refresh_per_second=4,  # the training program needs the processor more
        expand=True,
    )


def _show(metric: tuple[str, float]) -> str:
    name, value = metric
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    if name in ("mfu", "data_wait", "padding"):
        return f"{name.replace('_', ' ')} {value:.1%}"
    return f"{name.replace('_', ' ')} {value:.4g}"


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))
