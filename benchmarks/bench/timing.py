"""Times programs in turns, so that a temporary slowdown of the machine affects all of them."""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.bench import machine
from benchmarks.bench.program import Program

_TURN = 0.05  # minimum seconds per turn; short calls are repeated within it
_SEED = 0

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Times:
    """Seconds per call, one number per round: the mean over the calls of a turn."""

    seconds: tuple[float, ...]
    calls: int
    """Number of calls per turn."""

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seconds)


@dataclass
class Turn:
    """The turns of one program."""

    program: Program
    calls: int
    warm: bool
    """If True, make one untimed call first: the previous program has filled the caches, and its threads may still be
    spinning.
    """
    queue: bool
    """If True, wait only for the last call of a turn, as users do on an accelerator; otherwise for each call."""
    clock: Callable[[], float]
    seconds: list[float] = field(default_factory=list)

    @staticmethod
    def of(program: Program, queue: bool, clock: Callable[[], float]) -> "Turn":
        """Measures how many calls make a turn, after one warm-up call."""
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
    """Times each program: every round has one turn per program, in a random order that changes between rounds."""
    if not rounds:
        return {}
    queue = machine.platform_name() != "cpu"
    turns = {name: Turn.of(program, queue, clock) for name, program in programs.items()}
    order, rng = list(turns), random.Random(_SEED)
    for _ in range(rounds):
        rng.shuffle(order)  # so that no program always follows the same one
        for name in order:
            turns[name].take()
    return {name: Times(tuple(turn.seconds), turn.calls) for name, turn in turns.items()}
