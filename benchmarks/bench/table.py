"""Formats records as aligned lines, or as one table that folds on a narrow terminal."""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TextIO, TypeVar

import rich.box
import rich.console
import rich.table

from benchmarks.bench import machine
from benchmarks.bench.record import CHECKED, COMPILED, TIMED, Record

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Column(Generic[R]):
    """A column of a table."""

    name: str
    width: int
    """Width in aligned lines."""
    text: Callable[[R], str]
    left: bool = False
    """Left-aligned, and folded if there is no room."""


@dataclass(frozen=True)
class Table(Generic[R]):
    """How the records of a benchmark are shown, case by case."""

    columns: Sequence[Column[R]]
    title: Callable[[R], str]
    """The heading above the records of a case."""
    legend: str
    """Explains the columns."""
    remarks: Callable[[Sequence[R]], Sequence[str]] = lambda records: ()
    """Lines below the legend."""

    @property
    def width(self) -> int:
        """Number of characters of the longest line."""
        return sum(column.width + 1 for column in self.columns) - 1

    def header(self) -> str:
        """Returns the names of the columns."""
        return self._aligned([column.name for column in self.columns])

    def lines(self, records: Sequence[R]) -> list[str]:
        """Returns the records of one case under its title."""
        return [self.title(records[0]), *(self._aligned(self.cells(record)) for record in records)]

    def cells(self, record: R) -> list[str]:
        """Returns the cells of a record, in column order."""
        return [column.text(record) for column in self.columns]

    def draw(self, records: Sequence[R], stream: TextIO) -> None:
        """Draws all records as one table."""
        drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD)
        for column in self.columns:
            left = column.left
            drawn.add_column(column.name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
        last = None
        for record in records:
            if record.case != last:
                drawn.add_section()
                drawn.add_row(f"[bold]{self.title(record)}")
            last = record.case
            drawn.add_row(*self.cells(record), style=None if record.status in (TIMED, CHECKED, COMPILED) else "dim")
        rich.console.Console(file=stream).print(drawn)

    def footer(self, records: Sequence[R]) -> list[str]:
        """Returns why records have no time, what the columns mean, and the machine."""
        return [*notes(records), *textwrap.wrap(self.legend, 120), *self.remarks(records), measured_on()]

    def _aligned(self, texts: Sequence[str]) -> str:
        pairs = zip(texts, self.columns, strict=True)
        return " ".join(
            text.ljust(column.width) if column.left else text.rjust(column.width) for text, column in pairs
        ).rstrip()


def notes(records: Iterable[Record]) -> list[str]:
    """Returns why records have no time, each reason once."""
    reasons = Counter((record.implementation, record.status, record.reason) for record in records if record.reason)
    return [
        f"{name}: {status.replace('-', ' ')}: {reason}" + (f" ({count} rows)" if count > 1 else "")
        for (name, status, reason), count in reasons.items()
    ]


def measured_on() -> str:
    """Returns the machine and all versions."""
    found = machine.describe()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['device']}, {found['cores']} cores, Python {found['python']}, {versions}"


def implementation(record: Record) -> str:
    """Returns the name of the implementation."""
    return record.implementation


def milliseconds(record: Record) -> str:
    """Returns the median over the rounds, or the status if there are no times."""
    return number(record.times.median * 1e3) if record.times else without_times(record)


def milliseconds_range(record: Record) -> str:
    """Returns the fastest and the slowest round."""
    times = record.times
    return f"{number(min(times.seconds) * 1e3)} - {number(max(times.seconds) * 1e3)}" if times else ""


def compile_seconds(record: Record) -> str:
    """Returns the compile time, if known."""
    return number(record.compile_seconds) if record.compile_seconds is not None else ""


def planned_mebibytes(record: Record) -> str:
    """Returns the memory that the compiler plans for a call, if known."""
    return number(record.planned_bytes / 2**20) if record.planned_bytes else ""


def mebibytes_beyond_idle(record: Record) -> str:
    """Returns the peak memory of a process beyond Python and libraries, if measured."""
    peak = record.peak
    return number((peak.process_peak_bytes - peak.process_idle_bytes) / 2**20) if peak else ""


def without_times(record: Record) -> str:
    """Returns the status in words."""
    return record.status.replace("-", " ")


def number(value: float) -> str:
    """Formats a number with three significant digits, without an exponent.

    >>> [number(x) for x in (0.01234, 1.234, 56.78, 1234.5)]
    ['0.0123', '1.23', '56.8', '1,234']
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if value >= 1 else 3}g}" if value < 1 else f"{value:.{2 if value < 10 else 1}f}"
