"""Command-line arguments and output that all benchmarks share."""

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.bench.record import Line, Record, append
from benchmarks.bench.table import Table
from train.reports.progress import Progress

R = TypeVar("R", bound=Record)

Words = tuple[str, ...]
"""Words, given separately or with commas between them."""

_SHORT = 3  # rounds


@dataclass(frozen=True)
class Arguments:
    """Arguments of every benchmark."""

    rounds: int | None = None
    """Number of timed turns per implementation; 0 compares results without timing."""
    json: Path | None = None
    """File to append one line of JSON per row to."""

    def turns(self, default: int) -> int:
        """Returns the given rounds, or the default. Raises ValueError for a negative number."""
        found = default if self.rounds is None else self.rounds
        if found < 0:
            raise ValueError(f"rounds ({found}) must be at least 0")
        return found


@dataclass(frozen=True)
class PeerArguments(Arguments):
    """Arguments of every benchmark that compares with other libraries."""

    plot: Path | None = None
    """Chart of the speeds, written as PNG and SVG."""
    memory: bool = False
    """Also compute each row once in its own process, and report its peak memory."""
    short: bool = False
    """Fewer rounds, unless given."""

    def turns(self, default: int) -> int:
        """Returns the given rounds, or the default, reduced with `short`. Raises ValueError for a negative number."""
        return super().turns(min(default, _SHORT) if self.short else default)


def words(given: Words) -> Words:
    """Splits at commas and removes duplicates.

    >>> words(("fwd,bwd", "fwd"))
    ('fwd', 'bwd')
    """
    return tuple(dict.fromkeys(word for text in given for word in text.split(",") if word))


def numbers(name: str, given: Words) -> list[int]:
    """Returns distinct integers of at least 1; raises ValueError for other words, and for none."""
    found = words(given)
    if not found or not all(word.isdecimal() and int(word) for word in found):
        raise ValueError(f"{name} ({', '.join(found)}) must be numbers of at least 1")
    return [int(word) for word in found]


def check(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError for an unknown word."""
    known = tuple(known)
    unknown = [word for word in given if word not in known]
    if unknown:
        raise ValueError(f"no {name} {unknown[0]!r}: give {', '.join(known)}")


def show(measured: Iterable[Sequence[R]], total: int, table: Table[R], json: Path | None) -> list[R]:
    """Prints records and writes them as JSON as soon as they are measured, then prints the footer; returns all records.

    On a terminal too narrow for the lines, prints one folded table at the end.

    Args:
        measured: yields the records of one case at a time.
        total: number of cases.
        table: formats the records.
        json: file to append one line per record to; None for no file.
    """
    records: list[R] = []
    narrow = sys.stdout.isatty() and table.width > shutil.get_terminal_size().columns
    with Progress(total) as progress:
        if not narrow:
            progress.print(table.header())
        for done, found in enumerate(measured, 1):
            records += found
            if json is not None:
                append(json, found)
            if not narrow:
                progress.print("\n".join(table.lines(found)))
            progress.update(done)
    if narrow:
        table.draw(records, sys.stdout)
    print(*table.footer(records), sep="\n")
    return records


def plot(records: Iterable[Record], chart: Callable[[Sequence[Line], Path], Sequence[Path]], path: Path | None) -> None:
    """Draws the records if a path is given, and prints the paths of the files."""
    if path is not None:
        print(*chart([record.fields() for record in records], path), sep="\n")
