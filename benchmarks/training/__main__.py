"""Benchmarks updates against PyTorch, with the same model and batch: `python -m benchmarks.training`.

    python -m benchmarks.training --short                     # what `make bench-training` runs: some minutes
    python -m benchmarks.training --parts --memory --json benchmarks/results/training.jsonl \\
        --plot benchmarks/results/training.png
    python -m benchmarks.training --models base256 --implementations seqattn,torch --rounds 21

An update is loss, gradient and AdamW. Three implementations compute it: `train.update.step`, with one example per row
and without clipping; Hugging Face's `MarianMTModel`; and `torch.nn.Transformer`. The latter two run in eager PyTorch
with its fused AdamW, the usual setup of their users. All use float32, the same weights, dropout at the same places, and
all cores available to the process (`taskset` for fewer).

Results are compared first: the loss without dropout, the norm of its gradient, and the loss after the update. An
implementation that differs from ours is not timed. All take turns in one process, so compare only numbers of the same
run.
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
    """Measures updates, in 9 rounds, or 3 with --short.

    Lists are words separated by spaces or commas.
    """

    models: command.Words = tuple(MODELS)
    """Any of multi30k, base256."""
    implementations: command.Words = tuple(NAMES)
    """Any of seqattn, transformers, torch."""
    dropout: float | None = None
    """Dropout rate that replaces each model's own."""
    parts: bool = False
    """Also time the loss alone, and the loss with its gradient, to show where the time of an update goes."""


def plan(arguments: TrainingArguments) -> TrainingPlan:
    """Resolves the arguments to a plan. Raises ValueError for unknown names and bad rates."""
    models, names = command.words(arguments.models), command.words(arguments.implementations)
    command.check("model", models, MODELS)
    command.check("implementation", names, NAMES)
    if not models or not names:
        raise ValueError("models and implementations must be non-empty")
    if arguments.dropout is not None and not 0 <= arguments.dropout < 1:
        raise ValueError(f"dropout ({arguments.dropout}) must be in [0, 1)")
    cases = [MODELS[name] for name in models]
    if arguments.dropout is not None:
        cases = [replace(case, dropout_rate=arguments.dropout) for case in cases]
    parts = PARTS if arguments.parts else (UPDATE,)
    return TrainingPlan(cases, names, arguments.turns(_ROUNDS), arguments.memory, parts)


def parse(arguments: Sequence[str] | None = None) -> TrainingArguments:
    """Parses a command line. Defaults to that of this process."""
    return tyro.cli(TrainingArguments, prog="python -m benchmarks.training", args=arguments)


def main(arguments: TrainingArguments) -> int:
    """Prints the table. Returns 1 if our implementation fails, or if any two that work disagree, else 0."""
    wanted = plan(arguments)
    records = command.show(measure(wanted), len(wanted.cases), TABLE, arguments.json)
    command.plot(records, rates, arguments.plot)
    failed = any(record.status == FAILED for record in records if record.implementation == "seqattn")
    return int(failed or any(record.status == WRONG for record in records))


if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # otherwise a second run would skip compilation
    environment.command(lambda: main(parse()))
