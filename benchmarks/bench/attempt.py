"""Implementations that are tried and compared before they are timed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from benchmarks.bench.program import Program
from benchmarks.bench.record import TIMED, Record
from benchmarks.bench.timing import Times, interleaved

R = TypeVar("R", bound=Record)

WHOLE = "whole"
"""The part whose times are those of the record."""


@dataclass(frozen=True)
class Attempt(Generic[R]):
    """What came of an implementation before anything is timed."""

    record: R
    programs: Mapping[str, Program] = field(default_factory=dict)
    """What is to be timed, by part; empty unless the result is right."""
    result: Any = None
    """What is compared with the results of others; None where there is nothing to compare."""

    def wrong(self, reason: str) -> "Attempt[R]":
        """The attempt whose result turned out not to be right: its programs are not timed."""
        return Attempt(self.record.wrong(reason))


def take_turns(attempts: Iterable[Attempt[R]], rounds: int) -> dict[tuple[str, str], Times]:
    """Times of all programs, in turns, by implementation and part."""
    programs = {
        (one.record.implementation, part): program for one in attempts for part, program in one.programs.items()
    }
    return interleaved(programs, rounds)


def timed(record: R, times: Mapping[tuple[str, str], Times]) -> R:
    """The record with the times of its whole program, if there are any."""
    found = times.get((record.implementation, WHOLE))
    return replace(record, status=TIMED, times=found) if found else record
