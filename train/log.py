"""What a run tells people: rows of numbers in a file, and a progress bar or plain lines while they wait."""

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
import rich.console
import rich.progress
import rich.text

Row = dict[str, Any]

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """Rows of metrics as one flat JSON object a line, each handed to the system at once.

    JSON has no word for what is not finite, so such numbers are written as the strings "NaN", "Infinity" and
    "-Infinity"; `read_metrics` turns them back. An existing file is continued; a last line that a killed run left
    unfinished is dropped.

    Args:
        path: the file.
        also: is given each row, too, once it is written.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, also: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self.path, self._also = Path(path), also
        if self.path.exists():
            _drop_torn_line(self.path)
        self._file = self._open()

    def _open(self) -> io.FileIO:
        # Without a buffer: a row that a full disk does not take is not tried again when the file is closed.
        return self.path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row. Values are text, truth values, None, and Python, NumPy or JAX numbers.

        Raises:
            TypeError: a value is none of these, such as an array of several numbers.
            OSError: the disk does not take the row; the message names the file.
        """
        rest = _line(row)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            reason = f"{self.path}: a row could not be written ({error.strerror})"
            raise OSError(f"{reason}; free some space, then give the same command again") from error
        if self._also is not None:
            self._also(row)

    def truncate_after(self, step: int) -> None:
        """Drops the rows of later steps: a run that resumes at `step` writes them again."""
        kept = [row for row in read_metrics(self.path) if row.get("step", 0) <= step]
        self._file.close()
        replace(self.path, b"".join(map(_line, kept)))
        self._file = self._open()

    def close(self) -> None:
        """Closes the file; nothing is written afterwards."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """All rows of a metrics file, oldest first, without a last line that a killed run left unfinished.

    Raises:
        ValueError: a line is not a JSON object; the message names the file and the line.
    """
    finished, _, _ = Path(path).read_bytes().rpartition(b"\n")
    lines = finished.split(b"\n") if finished else []
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _line(row: Mapping[str, Any]) -> bytes:
    plain = {name: _scalar(name, value) for name, value in row.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _scalar(name: str, value: Any) -> str | bool | int | float | None:
    if not (value is None or isinstance(value, str | bool | int | float)):
        if np.shape(value) or not hasattr(value, "item"):
            raise TypeError(f"metric {name!r} must be a number, text or None, got {type(value).__name__}: {value!r}")
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _parse(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}; remove that line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object, got {line.decode()}")
    return {name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def _drop_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def replace(path: Path, content: bytes) -> None:
    """Writes a file such that a kill, or a machine without power, leaves either the old or the new one."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; a context manager.

    Rate and remaining time come from this session's steps alone, counted from the first update on, so that neither the
    steps before a resumption nor the first compilation count.

    Args:
        total: steps of the whole run.
        initial_step: steps that were done before this session.
        seconds: between two plain lines, at the least.
        stream: where to; standard output by default. From here on it shows what its encoding lacks as escapes.
        clock: seconds that never run backwards.
    """

    def __init__(
        self,
        total: int,
        *,
        initial_step: int = 0,
        seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._seconds, self._clock = total, seconds, clock
        self._stream = sys.stdout if stream is None else stream
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")
        self._first: tuple[int, float] | None = None
        self._printed = -math.inf
        self._metrics: dict[str, float] = {}
        self._bar = _bar(self._stream) if self._stream.isatty() and os.environ.get("TERM") != "dumb" else None
        if self._bar:
            self._task = self._bar.add_task("", total=total, completed=initial_step, text="")

    def update(self, step: int, **metrics: float) -> None:
        """Shows that `step` steps are done. Metrics stay on show until they are given anew; they are Python numbers."""
        now = self._clock()
        self._first = self._first or (step, now)
        self._metrics |= metrics
        text = "  ".join([*map(_show, self._metrics.items()), f"ETA {_duration(self._remaining(step, now))}"])
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._printed >= self._seconds or step == self._total:
            self._printed = now
            self.print(f"step {step}/{self._total}  {text}")

    def print(self, text: str) -> None:
        """Prints lines, above the bar where there is one."""
        if self._bar:
            self._bar.console.print(rich.text.Text(text), soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def _remaining(self, step: int, now: float) -> float | None:
        first_step, start = self._first or (step, now)
        if step <= first_step or now <= start:
            return None
        return (self._total - step) * (now - start) / (step - first_step)


def _bar(stream: TextIO) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.completed}/{task.total}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TextColumn("{task.fields[text]}", markup=False),
        console=rich.console.Console(file=stream),
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
