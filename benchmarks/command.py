"""What the command lines of all benchmarks have in common."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.row import line
from train.reports.progress import Progress


class Record(Protocol):
    """What came of an implementation on a case."""

    def record(self) -> dict[str, Any]:
        """Everything, in units without prefixes, with the machine it was measured on."""
        ...


Row = TypeVar("Row", bound=Record)

Words = tuple[str, ...]
"""Words that were given apart, or with commas between them."""


def words(given: Words) -> Words:
    """Each word once.

    >>> words(("fwd,bwd", "fwd"))
    ('fwd', 'bwd')
    """
    return tuple(dict.fromkeys(word for text in given for word in text.split(",") if word))


def check(name: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError for a word that is unknown."""
    unknown = [word for word in given if word not in known]
    if unknown:
        raise ValueError(f"no {name} {unknown[0]!r}: give {', '.join(known)}")


def append(path: Path, lines: Iterable[str]) -> None:
    """Adds lines to a file; its folder need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def shown(
    measured: Iterable[Sequence[Row]],
    total: int,
    *,
    header: Sequence[str],
    lines: Callable[[Sequence[Row]], Sequence[str]],
    json: Path | None,
) -> list[Row]:
    """All rows, which are printed, and written as JSON, as soon as they are measured.

    Args:
        measured: the rows of one case after the other.
        total: how many cases there are.
        header: of the table.
        lines: of the table, for the rows of a case.
        json: file that gets one line for each row; None for none.
    """
    rows: list[Row] = []
    with Progress(total, stream=sys.stdout) as progress:
        progress.print("\n".join(header))
        for done, found in enumerate(measured, 1):
            rows += found
            if json is not None:
                append(json, [line(row.record()) for row in found])
            progress.print("\n".join(lines(found)))
            progress.update(done)
    return rows
