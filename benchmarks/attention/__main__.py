"""Benchmarks attention against other libraries: `python -m benchmarks.attention`.

    python -m benchmarks.attention --short                    # what `make bench` runs: minutes
    python -m benchmarks.attention --json benchmarks/results/cpu.jsonl --plot benchmarks/results/cpu.png
    python -m benchmarks.attention --shapes cpu-t4096,gpt2-small --masks full,window --pass fwd
    python -m benchmarks.attention --shapes long --masks causal --pass bwd --implementations seqattn --rounds 1 --memory

On a GPU the same command measures in bfloat16 and adds the kernels of cuDNN and PyTorch. Every result is compared with
float64 first; a wrong one is not timed. All implementations take turns in one process, so compare only numbers of the
same run.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from benchmarks.attention import implementations, patterns
from benchmarks.attention.case import DIRECTIONS
from benchmarks.attention.chart import speeds
from benchmarks.attention.exact import TOLERANCES
from benchmarks.attention.implementations import BASELINE
from benchmarks.attention.measurement import AttentionPlan, measure
from benchmarks.attention.shapes import named
from benchmarks.attention.table import TABLE
from benchmarks.bench import command, machine
from benchmarks.bench.record import FAILED, WRONG
from train.devices import environment

_ROUNDS = 7


@dataclass(frozen=True)
class AttentionArguments(command.PeerArguments):
    """Measures attention, in 7 rounds, or 3 with --short.

    Lists are words separated by spaces or commas. Defaults depend on the device.
    """

    shapes: command.Words = ()
    """Names of shapes or of groups of shapes (benchmarks/attention/shapes.py), or sizes such as b2-t64-n4-d32."""
    masks: command.Words = ()
    """Any of full, causal, window, documents, prefix, alibi."""
    passes: Annotated[command.Words, tyro.conf.arg(name="pass")] = ()
    """fwd: forward. bwd: forward and backward, with the gradients of query, key and value."""
    implementations: command.Words = ()
    """Any of the names in benchmarks/attention/implementations.py."""
    baseline: str = BASELINE
    """The implementation that defines speed 1."""
    dtype: str | None = None
    """float32, bfloat16 (the default on accelerators), float16."""
    spread: bool = False
    """Spread the rounds of each case over the time of all cases of its shape. A slow minute of the machine then costs
    each case one round, not its median. Holds the arrays of all these cases at once.
    """
    short: bool = False
    """Fewer rounds, masks and implementations, unless given: about 5 minutes on two cores."""
    tolerance: float | None = None
    """Maximum error relative to the exact values. Defaults to a limit for the dtype."""
    product_size: int | None = None
    """Number of rows of the square matrices of the product that is timed for comparison."""


def plan(arguments: AttentionArguments) -> AttentionPlan:
    """Resolves the arguments to a plan. Raises ValueError for unknown names and bad sizes."""
    on_cpu, short = machine.platform_name() == "cpu", arguments.short
    shapes = command.words(arguments.shapes) or ("acceptance" if on_cpu else "gpu",)
    masks = command.words(arguments.masks) or tuple(patterns.PATTERNS)[: 4 if short else None]
    directions = command.words(arguments.passes) or DIRECTIONS
    names = command.words(arguments.implementations) or (implementations.SHORT if short else implementations.default())
    command.check("implementation", [*names, arguments.baseline], implementations.NAMES)
    dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    command.check("mask", masks, patterns.PATTERNS)
    command.check("pass", directions, DIRECTIONS)
    command.check("dtype", [dtype], [name for name in TOLERANCES if name != "float64"])
    size = arguments.product_size or (2048 if on_cpu else 8192)
    if size < 1:
        raise ValueError(f"the size of the product ({size}) must be at least 1")
    found = list(dict.fromkeys(shape for name in shapes for shape in named(name)))
    return AttentionPlan(
        shapes=found,
        patterns=masks,
        directions=directions,
        implementations=names,
        baseline=arguments.baseline,
        rounds=arguments.turns(_ROUNDS),
        dtype=dtype,
        tolerance=arguments.tolerance,
        memory=arguments.memory,
        product_size=size,
        spread=arguments.spread,
    )


def parse(arguments: Sequence[str] | None = None) -> AttentionArguments:
    """Parses a command line. Defaults to that of this process."""
    return tyro.cli(AttentionArguments, prog="python -m benchmarks.attention", args=arguments)


def main(arguments: AttentionArguments) -> int:
    """Prints the table. Returns 1 if one of our own implementations is wrong or fails, else 0."""
    # Without preallocation, since PyTorch needs memory on the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    wanted = plan(arguments)
    total = len(wanted.questions()) * len(wanted.directions)
    records = command.show(measure(wanted), total, TABLE, arguments.json)
    command.plot(records, speeds, arguments.plot)
    ours = (record.status for record in records if record.implementation.startswith("seqattn"))
    return int(any(status in (WRONG, FAILED) for status in ours))


if __name__ == "__main__":
    environment.command(lambda: main(parse()))
