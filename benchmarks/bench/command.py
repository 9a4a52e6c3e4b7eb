"""What the command lines of all benchmarks have in common."""

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
"""Words that were given apart, or with commas between them."""

_SHORT = 3  # rounds


@dataclass(frozen=True)
class Arguments:
    """What every benchmark takes."""

    rounds: int | None = None
    """How many turns each implementation has; 0 compares results and times nothing."""
    json: Path | None = None
    """File that gets one line of JSON for each row, after what it holds."""

    def turns(self, default: int) -> int:
        """The rounds that were given, or so many. Raises ValueError for a negative number."""
        found = default if self.rounds is None else self.rounds
        if found < 0:
            raise ValueError(f"rounds ({found}) must be at least 0")
        return found


@dataclass(frozen=True)
class PeerArguments(Arguments):
    """What every benchmark takes that has peers in other libraries."""

    plot: Path | None = None
    """Picture of the speeds, written as PNG and as SVG."""
    memory: bool = False
    """Also compute each row once in a process of its own and tell its peak."""
    short: bool = False
    """Fewer rounds, where they are not given."""

    def turns(self, default: int) -> int:
        """The rounds that were given, or so many, fewer for the short form. Raises ValueError for a negative number."""
        return super().turns(min(default, _SHORT) if self.short else default)


def words(given: Words) -> Words:
    """Each word once.

    >>> words(("fwd,bwd", "fwd"))
    ('fwd', 'bwd')
    """
    return tuple(dict.fromkeys(word for text in given for word in text.split(",") if word))


def numbers(name: str, given: Words) -> list[int]:
    """Numbers of at least 1, each once; ValueError for other words, and for none."""
    found = words(given)
    if not found or not all(word.isdecimal() and int(word) for word in found):
        raise ValueError(f"{name} ({', '.join(found)}) must be numbers of at least 1")
    return [int(word) for word in found]


def check(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError for a word that is unknown."""
    known = tuple(known)
    unknown = [word for word in given if word not in known]
    if unknown:
        raise ValueError(f"no {name} {unknown[0]!r}: give {', '.join(known)}")


def show(measured: Iterable[Sequence[R]], total: int, table: Table[R], json: Path | None) -> list[R]:
    """All records, which are printed, and written as JSON, as soon as they are measured, and what is to be said below.

    On a terminal that is too narrow for lines they are printed as one folded table at the end.

    Args:
        measured: the records of one case after the other.
        total: how many cases there are.
        table: how they are shown.
        json: file that gets one line for each record; None for none.
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
    """Draws records, where a path is given, and prints the paths of the pictures."""
    if path is not None:
        print(*chart([record.fields() for record in records], path), sep="\n")
