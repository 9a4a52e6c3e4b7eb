"""Turns, on a clock that programs move."""

from collections import Counter

import pytest

from benchmarks.bench import timing
from benchmarks.bench.program import Program


class Clock:
    def __init__(self) -> None:
        self.now, self.ran, self.waited = 0.0, [], 0

    def __call__(self) -> float:
        return self.now

    def program(self, name: str, seconds: float) -> Program:
        def run() -> str:
            self.now += seconds
            self.ran.append(name)
            return name

        def wait(result: str) -> None:
            assert result == name
            self.waited += 1

        return Program(run, wait, lambda result: [])


def test_in_every_round_each_program_has_one_turn():
    clock = Clock()
    programs = {name: clock.program(name, 1.0) for name in "abcde"}
    times = timing.interleaved(programs, 7, clock=clock)
    assert Counter(clock.ran) == dict.fromkeys(programs, 2 + 7)
    in_rounds = clock.ran[2 * len(programs) :]
    rounds = [in_rounds[start : start + 5] for start in range(0, len(in_rounds), 5)]
    assert all(sorted(turns) == list(programs) for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) > 1, "the order must change"
    assert clock.waited == len(clock.ran), "on a CPU each call is waited for"
    assert all(len(t.seconds) == 7 for t in times.values())


@pytest.mark.parametrize(("seconds", "calls"), [(2.0, 1), (0.01, 5), (1e-9, 1000)])
def test_a_time_is_that_of_one_call(seconds, calls):
    clock = Clock()
    times = timing.interleaved({"a": clock.program("a", seconds)}, 3, clock=clock)["a"]
    assert times.calls == calls
    assert times.seconds == pytest.approx([seconds] * 3)


def test_the_median_is_that_of_the_rounds():
    assert timing.Times((3.0, 1.0, 100.0), 1).median == 3


def test_on_an_accelerator_calls_queue(monkeypatch):
    monkeypatch.setattr(timing.machine, "platform_name", lambda: "gpu")
    clock = Clock()
    timing.interleaved({"a": clock.program("a", 0.01)}, 2, clock=clock)
    assert clock.waited == 2 + 2 * 2  # the first two calls; in a turn the untimed call and the last one
    assert len(clock.ran) == 2 + 2 * 6


def test_no_rounds_are_no_times():
    clock = Clock()
    assert timing.interleaved({"a": clock.program("a", 1.0)}, 0, clock=clock) == {}
    assert not clock.ran
