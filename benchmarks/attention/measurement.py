"""Measures attention: computes each case, compares it with the exact answer, and times correct results."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.attention import exact, implementations, memory, patterns
from benchmarks.attention.case import DIRECTIONS, AttentionCase
from benchmarks.attention.exact import Exact
from benchmarks.attention.product import ProductRate, product
from benchmarks.attention.record import AttentionRecord
from benchmarks.attention.shapes import Shape
from benchmarks.bench.attempt import WHOLE, Attempt, timed
from benchmarks.bench.program import Program
from benchmarks.bench.record import TIMED
from benchmarks.bench.timing import Times, interleaved

AttentionAttempt = Attempt[AttentionRecord]
_PRODUCT = "product"


@dataclass(frozen=True)
class AttentionPlan:
    """What to measure, and how."""

    shapes: Sequence[Shape]
    patterns: Sequence[str]
    directions: Sequence[str]
    implementations: Sequence[str]
    baseline: str
    rounds: int
    dtype: str
    tolerance: float | None
    memory: bool
    product_size: int
    spread: bool

    def questions(self) -> list[tuple[Shape, str]]:
        """Returns each compatible pair of shape and mask; one exact answer serves both passes."""
        return [(s, pattern) for s in self.shapes for pattern in self.patterns if patterns.fits(pattern, s)]

    def groups(self) -> list[list[tuple[Shape, str]]]:
        """Groups the questions whose cases take turns: all of a shape with `spread`, otherwise each one alone."""
        if not self.spread:
            return [[question] for question in self.questions()]
        groups = [[question for question in self.questions() if question[0] == shape] for shape in self.shapes]
        return [group for group in groups if group]


def measure(plan: AttentionPlan) -> Iterator[list[AttentionRecord]]:
    """Yields the records of one case at a time."""
    multiply = product(plan.product_size, plan.dtype) if plan.rounds else None
    for group in plan.groups():
        tried: dict[AttentionCase, list[AttentionAttempt]] = {}
        for shape, pattern in group:
            # An answer with gradients also contains the forward pass.
            widest = max(plan.directions, key=DIRECTIONS.index)
            answer = exact.solve(AttentionCase(shape, pattern, widest, plan.dtype), plan.tolerance)
            for direction in plan.directions:
                case = AttentionCase(shape, pattern, direction, plan.dtype)
                inputs = list(case.inputs())
                tried[case] = [attempt(name, case, inputs, answer) for name in plan.implementations]
        times = take_turns(tried, plan.rounds, multiply)
        for case, attempts in tried.items():
            yield [_finished(one.record, times[case], plan) for one in attempts]


def take_turns(
    tried: Mapping[AttentionCase, Sequence[AttentionAttempt]], rounds: int, multiply: Program | None
) -> dict[AttentionCase, dict[tuple[str, str], Times]]:
    """Times all correct results, by case, implementation and part, with a matrix product in each case."""
    programs: dict[tuple[AttentionCase, tuple[str, str]], Program] = {}
    for case, attempts in tried.items():
        right = {
            (case, (one.record.implementation, part)): program
            for one in attempts
            for part, program in one.programs.items()
        }
        programs |= right | ({(case, (_PRODUCT, WHOLE)): multiply} if multiply and right else {})
    times = interleaved(programs, rounds)
    return {case: {name: of for (here, name), of in times.items() if here == case} for case in tried}


def _finished(record: AttentionRecord, times: Mapping[tuple[str, str], Times], plan: AttentionPlan) -> AttentionRecord:
    """Returns the record with its times and memory."""
    record = replace(record, baseline=plan.baseline, baseline_times=times.get((plan.baseline, WHOLE)))
    record = timed(record, times)
    if record.status == TIMED:
        record = replace(record, product=ProductRate(plan.product_size, times[_PRODUCT, WHOLE]))
    return record.with_peak(lambda: memory.peak(record.case, record.implementation)) if plan.memory else record


def attempt(name: str, case: AttentionCase, inputs: Sequence[np.ndarray], answer: Exact) -> AttentionAttempt:
    """Prepares an implementation, runs it once and checks the result."""
    record = AttentionRecord(case=case, implementation=name)
    try:
        program = implementations.NAMES[name](case, inputs)
        error = answer.error(program.arrays(program.run()))
    except Exception as exception:  # a failure of one library must not end the run
        return Attempt(record.refused(exception))
    tried = Attempt(replace(record.prepared(program), error=error, how=program.how), {WHOLE: program})
    return (
        tried if error.right else tried.wrong(f"relative error {error.relative:.1e}, tolerance {answer.tolerance:.1e}")
    )
