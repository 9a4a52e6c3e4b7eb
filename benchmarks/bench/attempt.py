"""Trial runs: implementations run once and are compared before they are timed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from benchmarks.bench.program import Program
from benchmarks.bench.record import TIMED, Record
from benchmarks.bench.timing import Times, interleaved

R = TypeVar("R", bound=Record)

WHOLE = "whole"
"""The part that provides the times of the record."""


@dataclass(frozen=True)
class Attempt(Generic[R]):
    """The outcome of an implementation before timing."""

    record: R
    programs: Mapping[str, Program] = field(default_factory=dict)
    """The programs to time, by part; empty unless the result is right."""
    result: Any = None
    """The result to compare with others; None if there is none."""

    def wrong(self, reason: str) -> "Attempt[R]":
        """Marks the attempt as wrong, and drops its programs so that they are not timed."""
        return Attempt(self.record.wrong(reason))


def take_turns(attempts: Iterable[Attempt[R]], rounds: int) -> dict[tuple[str, str], Times]:
    """Times all programs in turns, by implementation and part."""
    programs = {
        (one.record.implementation, part): program for one in attempts for part, program in one.programs.items()
    }
    return interleaved(programs, rounds)


def timed(record: R, times: Mapping[tuple[str, str], Times]) -> R:
    """Returns the record with the times of its whole program, if any."""
    found = times.get((record.implementation, WHOLE))
    return replace(record, status=TIMED, times=found) if found else record
