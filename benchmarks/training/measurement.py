"""Measures updates: compares the first ones, and times implementations that agree."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from benchmarks.bench.attempt import Attempt, take_turns, timed
from benchmarks.bench.program import Program
from benchmarks.bench.record import TIMED
from benchmarks.bench.timing import Times
from benchmarks.training import memory
from benchmarks.training.case import TrainingCase, operations, tokens
from benchmarks.training.implementations import FORWARD, GRADIENT, NAMES, PEERS, UPDATE
from benchmarks.training.record import Beginning, TrainingRecord, Work
from train.data.batches import filled
from train.reports.flops import peak

TrainingAttempt = Attempt[TrainingRecord]


@dataclass(frozen=True)
class TrainingPlan:
    """What to measure, and how."""

    cases: Sequence[TrainingCase]
    implementations: Sequence[str]
    rounds: int
    memory: bool
    parts: Sequence[str] = (UPDATE,)
    """The parts to time."""


def measure(plan: TrainingPlan) -> Iterator[list[TrainingRecord]]:
    """Yields the records of one case at a time."""
    rate, source = peak(jax.local_devices()[0])
    for case in plan.cases:
        weights, batch = case.weights(), case.batch()
        work = Work(tokens(batch), tokens(filled(batch)), operations(case, weights), rate, source)
        records = [TrainingRecord(case=case, implementation=name, work=work) for name in plan.implementations]
        checked = compare([attempt(record, weights, plan.parts) for record in records])
        times = take_turns(checked, plan.rounds)
        yield [_finished(one.record, times, weights if plan.memory else None) for one in checked]


def attempt(
    record: TrainingRecord, weights: Mapping[str, np.ndarray], parts: Sequence[str] = (UPDATE,)
) -> TrainingAttempt:
    """Makes two updates without dropout, to compare, and two with dropout, the first of which compiles."""
    prepare, case = NAMES[record.implementation], record.case
    try:
        begun = beginning(prepare(replace(case, dropout_rate=0.0), weights, UPDATE))
        programs = {part: prepare(case, weights, part) for part in parts}
        first, second = (_seconds(programs[UPDATE]) for _ in range(2))
    except Exception as exception:  # a failure of one library must not end the run
        return Attempt(record.refused(exception))
    return Attempt(replace(record, beginning=begun, compile_seconds=max(0.0, first - second)), programs)


def beginning(program: Program) -> Beginning:
    """Returns the results of a program's first two updates."""
    loss, gradient_norm = program.arrays(program.run())
    next_loss, _ = program.arrays(program.run())
    return Beginning(float(loss), float(gradient_norm), float(next_loss))


def _seconds(program: Program) -> float:
    start = time.perf_counter()
    program.wait(program.run())
    return time.perf_counter() - start


def compare(tried: Sequence[TrainingAttempt]) -> list[TrainingAttempt]:
    """Marks attempts as wrong that differ from ours or, if ours does not work, from the first that works."""
    working = {one.record.implementation: one.record.beginning for one in tried if one.record.beginning}
    name = "seqattn" if "seqattn" in working else next(iter(working), "")

    def compared(one: TrainingAttempt) -> TrainingAttempt:
        difference = one.record.beginning.differs(working[name]) if one.record.beginning else ""
        return one.wrong(f"{difference} as {name}") if difference else one

    return [compared(one) for one in tried]


def _finished(
    record: TrainingRecord, times: Mapping[tuple[str, str], Times], weights: Mapping[str, np.ndarray] | None
) -> TrainingRecord:
    """Returns the record with its times; with its memory, too, if weights are given."""
    name, record = record.implementation, timed(record, times)
    if record.status == TIMED:
        peers = {peer: times[peer, UPDATE] for peer in PEERS if (peer, UPDATE) in times}
        forward, gradient = (times.get((name, part)) for part in (FORWARD, GRADIENT))
        record = replace(record, forward=forward, gradient=gradient, peers=peers)
    return record.with_peak(lambda: memory.peak(record.case, name, weights)) if weights is not None else record
