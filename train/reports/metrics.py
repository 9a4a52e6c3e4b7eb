"""Metrics files, `metrics.jsonl`: one JSON object per line, readable after a kill."""

import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from train.checkpoints.durable import replace

Row = dict[str, Any]

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """Writes rows of metrics, one flat JSON object per line, without buffering. A context manager.

    JSON cannot express non-finite numbers, so they are written as the strings "NaN", "Infinity" and "-Infinity";
    `read_metrics` converts them back. Appends to an existing file, after removing an incomplete last line of a killed
    run.

    Args:
        path: the file.
        also: a function that is called with each row after it is written.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, also: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self.path, self._also = Path(path), also
        if self.path.exists():
            _drop_torn_line(self.path)
        self._file = self._open()

    def _open(self) -> io.FileIO:
        # Unbuffered, so that a row that did not fit on a full disk is not written again when the file is closed.
        return self.path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row.

        Args:
            row: values by name: strings, booleans, None, or Python, NumPy or JAX scalars.

        Raises:
            TypeError: a value has another type, such as an array of several numbers.
            OSError: the row cannot be written; the message names the file.
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
        """Removes the rows of later steps, which a run that resumes at `step` writes again."""
        kept = [row for row in read_metrics(self.path) if row.get("step", 0) <= step]
        self._file.close()
        replace(self.path, b"".join(map(_line, kept)))
        self._file = self._open()

    def close(self) -> None:
        """Closes the file. Nothing can be written afterwards."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """Reads all rows of a metrics file, oldest first; ignores an incomplete last line of a killed run.

    Raises:
        FileNotFoundError: the file does not exist.
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
