"""Times of programs that take turns: what slows the machine for a while slows all of them."""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.bench import machine
from benchmarks.bench.program import Program

_TURN = 0.05  # seconds that a turn lasts at least, so that short calls are repeated in it
_SEED = 0

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Times:
    """Seconds of one call, one figure for each round: the mean over the calls of a turn."""

    seconds: tuple[float, ...]
    calls: int
    """How often each turn calls."""

    @property
    def median(self) -> float:
        """That of the rounds."""
        return statistics.median(self.seconds)


@dataclass
class Turn:
    """One program's turn in each round."""

    program: Program
    calls: int
    warm: bool
    """Call once untimed before: what ran before has filled the caches, and its threads may still wait for work."""
    queue: bool
    """Wait for the last call only, as one does on an accelerator; else for each."""
    clock: Callable[[], float]
    seconds: list[float] = field(default_factory=list)

    @staticmethod
    def of(program: Program, queue: bool, clock: Callable[[], float]) -> "Turn":
        """Measures, after a first call that does not count, how many calls make a turn."""
        program.wait(program.run())
        start = clock()
        program.wait(program.run())
        once = max(clock() - start, 1e-9)
        return Turn(program, max(1, min(1000, round(_TURN / once))), once < 2 * _TURN, queue, clock)

    def take(self) -> None:
        """Times one turn."""
        if self.warm:
            self.program.wait(self.program.run())
        start = self.clock()
        for call in range(self.calls):
            result = self.program.run()
            if not self.queue or call == self.calls - 1:
                self.program.wait(result)
        self.seconds.append((self.clock() - start) / self.calls)


def interleaved(
    programs: Mapping[Name, Program], rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[Name, Times]:
    """Times of each program: in every round each has one turn, in an order that changes from round to round."""
    if not rounds:
        return {}
    queue = machine.platform_name() != "cpu"
    turns = {name: Turn.of(program, queue, clock) for name, program in programs.items()}
    order, rng = list(turns), random.Random(_SEED)
    for _ in range(rounds):
        rng.shuffle(order)  # so that nobody always follows the same one
        for name in order:
            turns[name].take()
    return {name: Times(tuple(turn.seconds), turn.calls) for name, turn in turns.items()}
