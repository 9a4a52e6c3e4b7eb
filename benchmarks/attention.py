"""What attention costs, here and elsewhere: `python -m benchmarks.attention`.

    python -m benchmarks.attention --short                    # what `make bench` runs: minutes
    python -m benchmarks.attention --json benchmarks/results/cpu.jsonl --plot benchmarks/results/cpu.png
    python -m benchmarks.attention --shapes cpu-t4096,gpt2-small --masks full,window --pass fwd
    python -m benchmarks.attention --shapes long --masks causal --pass bwd --implementations seqattn --rounds 1 --memory

On a GPU the same command measures in bfloat16, with cuDNN and PyTorch's kernels beside ours. Every result is compared
with float64 before it is timed; a wrong one has no time. All implementations take turns in one process, so that only
figures of one run are to be compared.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks import chart, command, exact, implementations, machine, memory, patterns, table
from benchmarks.case import DIRECTIONS, Case
from benchmarks.exact import Exact
from benchmarks.implementations import BASELINE
from benchmarks.program import Program, product
from benchmarks.row import CHECKED, FAILED, TIMED, WRONG, Rate, Row, refusal
from benchmarks.shapes import Shape, named
from benchmarks.timing import Times, interleaved
from train.devices import environment
from train.reports.progress import Progress

_PRODUCT = "product"


@dataclass(frozen=True)
class Arguments:
    """Measures attention. Lists are words separated by spaces or commas; what is not given depends on the device."""

    shapes: command.Words = ()
    """Names of shapes or groups of them (benchmarks/shapes.py), or sizes such as b2-t64-n4-d32."""
    masks: command.Words = ()
    """Of full, causal, window, documents, prefix, alibi."""
    passes: Annotated[command.Words, tyro.conf.arg(name="pass")] = ()
    """fwd: forward. bwd: forward and backward, with the gradients of query, key and value."""
    implementations: command.Words = ()
    """Of the names in benchmarks/implementations.py."""
    baseline: str = BASELINE
    """The implementation that speeds are relative to."""
    rounds: int | None = None
    """How many turns each implementation has; 0 checks results and times nothing."""
    dtype: str | None = None
    """float32, bfloat16 (the default on accelerators), float16."""
    json: Path | None = None
    """File that gets one line of JSON for each row, after what it holds."""
    plot: Path | None = None
    """Picture of the speeds, written as PNG and as SVG."""
    memory: bool = False
    """Also compute each row once in a process of its own and tell its peak."""
    spread: bool = False
    """Spread the rounds of a case over the time of all cases of its shape, so that a slow minute of the machine costs
    each case one round and none its median; all their arrays are held at once."""
    short: bool = False
    """Fewer rounds, masks and implementations where they are not given: about 5 minutes on two cores."""
    tolerance: float | None = None
    """How large an error may be by the size of the exact values; by default what the dtype allows."""
    product_size: int | None = None
    """Rows of the square matrices whose product is timed beside."""


@dataclass(frozen=True)
class Plan:
    """Arguments, checked, with what was left open filled in."""

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
        """Each shape and mask that fit: one exact answer serves both passes."""
        return [(s, pattern) for s in self.shapes for pattern in self.patterns if patterns.fits(pattern, s)]

    def groups(self) -> list[list[tuple[Shape, str]]]:
        """Questions whose cases take turns: those of a shape where rounds are spread, else each alone."""
        if not self.spread:
            return [[question] for question in self.questions()]
        groups = [[question for question in self.questions() if question[0] == shape] for shape in self.shapes]
        return [group for group in groups if group]


def plan(arguments: Arguments) -> Plan:
    """Raises ValueError for what does not exist."""
    on_cpu, short = machine.platform_name() == "cpu", arguments.short
    shapes = command.words(arguments.shapes) or ("acceptance" if on_cpu else "gpu",)
    masks = command.words(arguments.masks) or tuple(patterns.PATTERNS)[: 4 if short else None]
    directions = command.words(arguments.passes) or DIRECTIONS
    names = command.words(arguments.implementations) or (implementations.SHORT if short else implementations.default())
    implementations.check([*names, arguments.baseline])
    dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    command.check("mask", masks, tuple(patterns.PATTERNS))
    command.check("pass", directions, DIRECTIONS)
    command.check("dtype", (dtype,), tuple(name for name in exact.TOLERANCES if name != "float64"))
    rounds = arguments.rounds if arguments.rounds is not None else 3 if short else 7
    size = arguments.product_size or (2048 if on_cpu else 8192)
    if rounds < 0 or size < 1:
        raise ValueError(f"rounds ({rounds}) must be at least 0 and the size of the product ({size}) at least 1")
    found = list(dict.fromkeys(shape for name in shapes for shape in named(name)))
    return Plan(
        found,
        masks,
        directions,
        names,
        arguments.baseline,
        rounds,
        dtype,
        arguments.tolerance,
        arguments.memory,
        size,
        arguments.spread,
    )


def measure(wanted: Plan) -> Iterator[list[Row]]:
    """The rows of one case after the other."""
    multiply = product(wanted.product_size, wanted.dtype) if wanted.rounds else None
    for group in wanted.groups():
        tried: dict[Case, dict[str, tuple[Row, Program | None]]] = {}
        for shape, pattern in group:
            # One with gradients answers the forward pass, too.
            widest = max(wanted.directions, key=DIRECTIONS.index)
            answer = exact.solve(Case(shape, pattern, widest, wanted.dtype), wanted.tolerance)
            for direction in wanted.directions:
                case = Case(shape, pattern, direction, wanted.dtype)
                inputs = list(case.inputs())
                tried[case] = {name: attempt(name, case, inputs, answer) for name in wanted.implementations}
        times = take_turns(tried, wanted.rounds, multiply)
        for case, attempts in tried.items():
            yield [_finished(row, times[case], wanted) for row, _ in attempts.values()]


def take_turns(
    tried: Mapping[Case, Mapping[str, tuple[Row, Program | None]]], rounds: int, multiply: Program | None
) -> dict[Case, dict[str, Times]]:
    """Times what was right in all cases, by case and name, with a matrix product beside each case."""
    programs: dict[tuple[Case, str], Program] = {}
    for case, attempts in tried.items():
        right = {(case, name): program for name, (_, program) in attempts.items() if program}
        programs |= right | ({(case, _PRODUCT): multiply} if multiply and right else {})
    times = interleaved(programs, rounds)
    return {case: {name: of for (here, name), of in times.items() if here == case} for case in tried}


def _finished(row: Row, times: Mapping[str, Times], wanted: Plan) -> Row:
    """A row with what was measured in its case."""
    row = replace(row, baseline=wanted.baseline, baseline_times=times.get(wanted.baseline))
    if row.implementation in times:
        rate = Rate(wanted.product_size, times[_PRODUCT])
        row = replace(row, status=TIMED, times=times[row.implementation], product=rate)
    return _with_peak(row) if wanted.memory and row.status in (CHECKED, TIMED) else row


def attempt(name: str, case: Case, inputs: Sequence[np.ndarray], answer: Exact) -> tuple[Row, Program | None]:
    """Prepares an implementation, runs it once and checks the result; the program only if that is right."""
    row = Row(case, name, CHECKED)
    try:
        program = implementations.NAMES[name](case, inputs)
        error = answer.error(program.arrays(program.run()))
    except Exception as exception:  # of any library: it costs that row and no other
        status, reason = refusal(exception)
        return replace(row, status=status, reason=reason), None
    row = replace(row, error=error, how=program.how, planned_bytes=program.planned_bytes)
    row = replace(row, compile_seconds=program.compile_seconds)
    if error.right:
        return row, program
    reason = f"{case.name}: relative error {error.relative:.1e}, tolerance {answer.tolerance:.1e}"
    return replace(row, status=WRONG, reason=reason), None


def _with_peak(row: Row) -> Row:
    try:
        return replace(row, peak=memory.peak(row.case, row.implementation))
    except RuntimeError as error:
        return replace(row, reason=f"peak memory unknown: {error}")


def parse(arguments: Sequence[str] | None = None) -> Arguments:
    """What a command line asks for; that of this process by default."""
    return tyro.cli(Arguments, prog="python -m benchmarks.attention", args=arguments)


def main(arguments: Arguments) -> int:
    """Prints the table; returns 1 if one of our own implementations is wrong or fails, else 0."""
    # Allocated at need, the memory of a GPU is there for PyTorch, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    wanted = plan(arguments)
    rows: list[Row] = []
    on_terminal = sys.stdout.isatty()
    total = len(wanted.questions()) * len(wanted.directions)
    with Progress(total) as progress:
        if not on_terminal:
            progress.print(table.plain_header())
        for done, found in enumerate(measure(wanted), 1):
            rows += found
            if arguments.json:
                command.append(arguments.json, [row.line() for row in found])
            if not on_terminal:
                progress.print("\n".join(table.plain_lines(found)))
            progress.update(done)
    if on_terminal:
        table.draw(rows, sys.stdout)
    print(*table.notes(rows), *table.footer(rows), sep="\n")
    if arguments.plot:
        print(*chart.speeds(rows, arguments.plot), sep="\n")
    return int(any(row.status in (WRONG, FAILED) for row in rows if row.implementation.startswith("seqattn")))


if __name__ == "__main__":
    environment.command(lambda: main(parse()))
