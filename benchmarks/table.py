"""Rows as people read them: a table on a terminal, aligned lines elsewhere."""

import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, TextIO

import rich.box
import rich.console
import rich.table

from benchmarks import machine
from benchmarks.case import BACKWARD
from benchmarks.row import CHECKED, TIMED, Row

_COLUMNS = {  # width in plain lines
    "implementation": 20,
    "ms": 13,
    "min - max": 19,
    "speed": 9,
    "TFLOP/s": 9,
    "of product": 11,
    "planned MiB": 12,
    "peak MiB": 9,
    "error": 9,
    "compile s": 10,
    "mask as": 30,
}
_LEFT = ("implementation", "mask as")

LEGEND = (
    "ms: median of the rounds, their range beside it. speed: times as fast as the baseline. TFLOP/s: useful work, that "
    f"of pairs that may attend; bwd is forward and backward, counted {BACKWARD} times the forward pass. of product: by "
    "the rate of a plain matrix product in the same rounds. planned MiB: arguments, results and temporaries as XLA "
    "plans the call (PyTorch: its allocator's peak, on a GPU). peak MiB: of a process that does nothing else, Python "
    "and JAX included. error: the largest absolute one, against float64. compile s: once a shape, not in ms."
)


def cells(row: Row) -> list[str]:
    """A row's texts, in the order of the columns."""
    times, milli, mebi = row.times, 1e3, 2**20
    return [
        row.implementation,
        number(times.median * milli) if times else row.status.replace("-", " "),
        f"{number(min(times.seconds) * milli)} - {number(max(times.seconds) * milli)}" if times else "",
        f"{row.speed:.2f}x" if row.speed else "",
        number(row.flops / 1e12) if row.flops else "",
        f"{row.product_share:.0%}" if row.product_share else "",
        number(row.planned_bytes / mebi) if row.planned_bytes else "",
        number(row.peak.process_peak_bytes / mebi) if row.peak else "",
        f"{row.error.largest:.1e}" if row.error else "",
        number(row.compile_seconds) if row.compile_seconds else "",
        row.how,
    ]


def plain_header() -> str:
    """The names of the columns over plain lines."""
    return aligned(list(_COLUMNS), _COLUMNS)


def plain_lines(rows: Sequence[Row]) -> list[str]:
    """The rows of one case under its name."""
    return [f"{title(rows[0])}", *(aligned(cells(row), _COLUMNS) for row in rows)]


def draw(rows: Sequence[Row], stream: TextIO) -> None:
    """All rows as one table."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name in _COLUMNS:
        right = name not in _LEFT
        table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
    last = None
    for row in rows:
        if row.case != last:
            table.add_section()
            table.add_row(f"[bold]{title(row)}")
        last = row.case
        table.add_row(*cells(row), style=None if row.status in (TIMED, CHECKED) else "dim")
    rich.console.Console(file=stream).print(table)


def title(row: Row) -> str:
    """The case and its sizes."""
    shape = row.case.shape
    sizes = f"B{shape.batch} T{shape.length} N{shape.num_heads} D{shape.head_dim}"
    sizes += f" S{shape.size}" if shape.num_keys else ""
    sizes += f" K{shape.kv_heads}" if shape.num_kv_heads else ""
    return f"{row.case.name} ({sizes}, {row.case.dtype})"


class Tried(Protocol):
    """A row of any benchmark."""

    @property
    def implementation(self) -> str:
        """Who."""

    @property
    def status(self) -> str:
        """One of those in benchmarks/row.py."""

    @property
    def reason(self) -> str:
        """Why there is no time."""


def notes(rows: Iterable[Tried]) -> list[str]:
    """Why rows have no time, each reason once."""
    reasons = Counter((row.implementation, row.status, row.reason) for row in rows if row.reason)
    return [
        f"{name}: {status.replace('-', ' ')}: {reason}" + (f" ({count} rows)" if count > 1 else "")
        for (name, status, reason), count in reasons.items()
    ]


def footer(rows: Sequence[Row]) -> list[str]:
    """What the columns mean, the baseline, the rate of the product, the machine."""
    lines = textwrap.wrap(LEGEND, 120)
    if rows:
        lines.append(f"baseline: {rows[0].baseline}")
    rates = sorted(row.product.flops / 1e12 for row in rows if row.product)
    if rates:
        size = next(row.product.size for row in rows if row.product)
        lines.append(f"product of {size} x {size}: {number(rates[0])} to {number(rates[-1])} TFLOP/s")
    return [*lines, measured_on()]


def measured_on() -> str:
    """The machine and all versions."""
    found = machine.describe()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['device']}, {found['cores']} cores, Python {found['python']}, {versions}"


def aligned(texts: Sequence[str], columns: Mapping[str, int], left: Collection[str] = _LEFT) -> str:
    """A line of texts in columns of these names and widths."""
    pairs = zip(texts, columns.items(), strict=True)
    return " ".join(text.ljust(width) if name in left else text.rjust(width) for text, (name, width) in pairs).rstrip()


def number(value: float) -> str:
    """Three significant digits, without an exponent.

    >>> [number(x) for x in (0.01234, 1.234, 56.78, 1234.5)]
    ['0.0123', '1.23', '56.8', '1,234']
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if value >= 1 else 3}g}" if value < 1 else f"{value:.{2 if value < 10 else 1}f}"
