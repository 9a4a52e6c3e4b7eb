"""What the command lines of all benchmarks have in common."""

from collections.abc import Iterable, Sequence
from pathlib import Path

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
