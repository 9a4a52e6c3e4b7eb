"""What an update costs, here and in PyTorch, of the same model and batch: `python -m benchmarks.training`.

    python -m benchmarks.training --short                     # what `make bench-training` runs: some minutes
    python -m benchmarks.training --parts --memory --json benchmarks/results/training.jsonl \\
        --plot benchmarks/results/training.png
    python -m benchmarks.training --models base256 --implementations seqattn,torch --rounds 21

Loss, gradient and AdamW by `train.update.step`, in rows of one example and without clipping; by Hugging Face's
`MarianMTModel`; and by `torch.nn.Transformer`, both in eager PyTorch with its fused AdamW, as their users run them. All
in float32, from the same weights, with dropout at the same places, and with all cores that the process may use
(`taskset` for fewer).

Who does another computation has no time: before anything is timed, the first loss without dropout, the norm of its
gradient, and the loss after the update are compared with ours. All take turns in one process: only figures of one run
are to be compared.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks import command, table, training_chart, training_memory, training_row
from benchmarks.program import Program
from benchmarks.row import CHECKED, FAILED, TIMED, WRONG, refusal
from benchmarks.timing import Times, interleaved
from benchmarks.training_case import MODELS, TrainingCase, operations, tokens
from benchmarks.training_implementations import FORWARD, GRADIENT, NAMES, PARTS, PEERS, UPDATE
from benchmarks.training_row import Beginning, TrainingRow, Work
from train.data.batches import filled
from train.devices import environment
from train.reports.flops import peak


@dataclass(frozen=True)
class Arguments:
    """Measures updates. Lists are words separated by spaces or commas."""

    models: command.Words = tuple(MODELS)
    """Of multi30k, base256."""
    implementations: command.Words = tuple(NAMES)
    """Of seqattn, transformers, torch."""
    dropout: float | None = None
    """In place of each model's own rate."""
    rounds: int | None = None
    """How many turns each implementation has, 9 by default; 0 compares results and times nothing."""
    json: Path | None = None
    """File that gets one line of JSON for each row, after what it holds."""
    plot: Path | None = None
    """Picture of the tokens a second, written as PNG and as SVG."""
    memory: bool = False
    """Also make updates in a process of its own for each row and tell its peak."""
    parts: bool = False
    """Also time the loss alone, and the loss with its gradient: where the time of an update goes."""
    short: bool = False
    """Fewer rounds, where they are not given."""


@dataclass(frozen=True)
class Plan:
    """Arguments, checked, with what was left open filled in."""

    cases: Sequence[TrainingCase]
    implementations: Sequence[str]
    rounds: int
    memory: bool
    parts: Sequence[str] = (UPDATE,)
    """What is timed."""


def plan(arguments: Arguments) -> Plan:
    """Raises ValueError for what does not exist."""
    models, names = command.words(arguments.models), command.words(arguments.implementations)
    command.check("model", models, tuple(MODELS))
    command.check("implementation", names, tuple(NAMES))
    rounds = arguments.rounds if arguments.rounds is not None else 3 if arguments.short else 9
    if not models or not names or rounds < 0:
        raise ValueError(f"models and implementations must be named, and rounds ({rounds}) be at least 0")
    if arguments.dropout is not None and not 0 <= arguments.dropout < 1:
        raise ValueError(f"dropout ({arguments.dropout}) must be in [0, 1)")
    cases = [MODELS[name] for name in models]
    if arguments.dropout is not None:
        cases = [replace(case, dropout_rate=arguments.dropout) for case in cases]
    return Plan(cases, names, rounds, arguments.memory, PARTS if arguments.parts else (UPDATE,))


@dataclass(frozen=True)
class Attempt:
    """What came of an implementation before anything is timed; programs, by part, only where it works."""

    row: TrainingRow
    programs: Mapping[str, Program] = field(default_factory=dict)


def measure(wanted: Plan) -> Iterator[list[TrainingRow]]:
    """The rows of one case after the other."""
    rate, source = peak(jax.local_devices()[0])
    for case in wanted.cases:
        weights, batch = case.weights(), case.batch()
        work = Work(tokens(batch), tokens(filled(batch)), operations(case, weights), rate, source)
        rows = [TrainingRow(case, name, CHECKED, work) for name in wanted.implementations]
        checked = compare([attempt(row, weights, wanted.parts) for row in rows])
        programs = {
            (one.row.implementation, part): program for one in checked for part, program in one.programs.items()
        }
        times = interleaved(programs, wanted.rounds)
        yield [_finished(one.row, times, weights if wanted.memory else None) for one in checked]


def attempt(row: TrainingRow, weights: Mapping[str, np.ndarray], parts: Sequence[str] = (UPDATE,)) -> Attempt:
    """Makes two updates without dropout, which can be compared, and two with it, of which the first one compiles."""
    prepare, case = NAMES[row.implementation], row.case
    try:
        begun = beginning(prepare(replace(case, dropout_rate=0.0), weights, UPDATE))
        programs = {part: prepare(case, weights, part) for part in parts}
        first, second = (_seconds(programs[UPDATE]) for _ in range(2))
    except Exception as exception:  # of any library: it costs the row of this one and no other
        status, reason = refusal(exception)
        return Attempt(replace(row, status=status, reason=reason))
    return Attempt(replace(row, beginning=begun, compile_seconds=max(0.0, first - second)), programs)


def beginning(program: Program) -> Beginning:
    """What the first two updates of a program come to."""
    loss, gradient_norm = program.arrays(program.run())
    next_loss, _ = program.arrays(program.run())
    return Beginning(float(loss), float(gradient_norm), float(next_loss))


def _seconds(program: Program) -> float:
    start = time.perf_counter()
    program.wait(program.run())
    return time.perf_counter() - start


def compare(tried: Sequence[Attempt]) -> list[Attempt]:
    """The attempts, and none that computes something else than ours, or, where ours does not work, than the first."""
    working = {one.row.implementation: one.row.beginning for one in tried if one.row.beginning}
    name = "seqattn" if "seqattn" in working else next(iter(working), "")

    def compared(one: Attempt) -> Attempt:
        difference = one.row.beginning.differs(working[name]) if one.row.beginning else ""
        if not difference:
            return one
        return Attempt(replace(one.row, status=WRONG, reason=f"{one.row.case.name}: {difference} as {name}"))

    return [compared(one) for one in tried]


def _finished(
    row: TrainingRow, times: Mapping[tuple[str, str], Times], weights: Mapping[str, np.ndarray] | None
) -> TrainingRow:
    """A row with what was measured; its memory, too, where weights are given."""
    name = row.implementation
    if (name, UPDATE) in times:
        peers = {peer: times[peer, UPDATE] for peer in PEERS if (peer, UPDATE) in times}
        forward, gradient = (times.get((name, part)) for part in (FORWARD, GRADIENT))
        row = replace(row, status=TIMED, times=times[name, UPDATE], forward=forward, gradient=gradient, peers=peers)
    if weights is None or row.status not in (CHECKED, TIMED):
        return row
    try:
        return replace(row, peak=training_memory.peak(row.case, name, weights))
    except RuntimeError as error:
        return replace(row, reason=f"peak memory unknown: {error}")


def parse(arguments: Sequence[str] | None = None) -> Arguments:
    """What a command line asks for; that of this process by default."""
    return tyro.cli(Arguments, prog="python -m benchmarks.training", args=arguments)


def main(arguments: Arguments) -> int:
    """Prints the table; returns 1 if ours fails, or any two that work disagree, else 0."""
    wanted = plan(arguments)
    options: dict[str, Any] = {"header": training_row.header(), "lines": training_row.lines, "json": arguments.json}
    rows = command.shown(measure(wanted), len(wanted.cases), **options)
    print(*table.notes(rows), *training_row.footer(rows), sep="\n")
    if arguments.plot:
        print(*training_chart.rates(rows, arguments.plot), sep="\n")
    failed = any(row.status == FAILED for row in rows if row.implementation == "seqattn")
    return int(failed or any(row.status == WRONG for row in rows))


if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # else a second run would find its programs compiled
    environment.command(lambda: main(parse()))
