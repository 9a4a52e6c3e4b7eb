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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import tyro

from benchmarks.bench import command
from benchmarks.bench.record import FAILED, WRONG
from benchmarks.training.case import MODELS
from benchmarks.training.chart import rates
from benchmarks.training.implementations import NAMES, PARTS, UPDATE
from benchmarks.training.measurement import TrainingPlan, measure
from benchmarks.training.table import TABLE
from train.devices import environment

_ROUNDS = 9


@dataclass(frozen=True)
class TrainingArguments(command.PeerArguments):
    """Measures updates, in 9 rounds, with --short in 3. Lists are words separated by spaces or commas."""

    models: command.Words = tuple(MODELS)
    """Of multi30k, base256."""
    implementations: command.Words = tuple(NAMES)
    """Of seqattn, transformers, torch."""
    dropout: float | None = None
    """In place of each model's own rate."""
    parts: bool = False
    """Also time the loss alone, and the loss with its gradient: where the time of an update goes."""


def plan(arguments: TrainingArguments) -> TrainingPlan:
    """Raises ValueError for what does not exist."""
    models, names = command.words(arguments.models), command.words(arguments.implementations)
    command.check("model", models, MODELS)
    command.check("implementation", names, NAMES)
    if not models or not names:
        raise ValueError("models and implementations must be named")
    if arguments.dropout is not None and not 0 <= arguments.dropout < 1:
        raise ValueError(f"dropout ({arguments.dropout}) must be in [0, 1)")
    cases = [MODELS[name] for name in models]
    if arguments.dropout is not None:
        cases = [replace(case, dropout_rate=arguments.dropout) for case in cases]
    parts = PARTS if arguments.parts else (UPDATE,)
    return TrainingPlan(cases, names, arguments.turns(_ROUNDS), arguments.memory, parts)


def parse(arguments: Sequence[str] | None = None) -> TrainingArguments:
    """What a command line asks for; that of this process by default."""
    return tyro.cli(TrainingArguments, prog="python -m benchmarks.training", args=arguments)


def main(arguments: TrainingArguments) -> int:
    """Prints the table; returns 1 if ours fails, or any two that work disagree, else 0."""
    wanted = plan(arguments)
    records = command.show(measure(wanted), len(wanted.cases), TABLE, arguments.json)
    command.plot(records, rates, arguments.plot)
    failed = any(record.status == FAILED for record in records if record.implementation == "seqattn")
    return int(failed or any(record.status == WRONG for record in records))


if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # else a second run would find its programs compiled
    environment.command(lambda: main(parse()))
