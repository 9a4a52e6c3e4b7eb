"""Benchmarks decoding against other libraries, with the same weights: `python -m benchmarks.decoding`.

    python -m benchmarks.decoding --short                     # what `make bench-decoding` runs: some minutes
    python -m benchmarks.decoding --memory --json benchmarks/results/decoding.jsonl \\
        --plot benchmarks/results/decoding.png
    python -m benchmarks.decoding --batches 1 --beams 4 --implementations seqattn,ctranslate2 --rounds 21

The model is a MarianMT with random weights (3 + 3 layers of 256, vocabulary 8000) that never ends early, so all do the
same work. It runs in float32 on all cores available to the process (`taskset` for fewer). Outputs are compared first;
an implementation with different tokens is not timed. All take turns in one process, so compare only numbers of the same
run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro

from benchmarks.bench import command
from benchmarks.bench.marian import Sizes
from benchmarks.bench.record import FAILED, WRONG
from benchmarks.decoding.case import DecodingCase
from benchmarks.decoding.chart import rates
from benchmarks.decoding.implementations import NAMES
from benchmarks.decoding.measurement import DecodingPlan, measure
from benchmarks.decoding.table import TABLE
from train.devices import environment

_ROUNDS = 9


@dataclass(frozen=True)
class DecodingArguments(command.PeerArguments):
    """Measures decoding, in 9 rounds, or 3 with --short.

    Lists are words separated by spaces or commas.
    """

    batches: command.Words = ("1", "64")
    """Numbers of sources that are decoded at once."""
    beams: command.Words = ("1", "4")
    """Beam sizes; 1 is greedy."""
    implementations: command.Words = tuple(NAMES)
    """Any of seqattn, transformers, ctranslate2."""
    length: int = 24
    """Number of tokens of each target."""
    sizes: Sizes = field(default_factory=Sizes)


def plan(arguments: DecodingArguments) -> DecodingPlan:
    """Resolves the arguments to a plan. Raises ValueError for unknown names and bad sizes."""
    names = command.words(arguments.implementations)
    command.check("implementation", names, NAMES)
    batches, beams = command.numbers("batches", arguments.batches), command.numbers("beams", arguments.beams)
    sizes, length = arguments.sizes, arguments.length
    if length < 1 or sizes.source_length < 1 or sizes.vocab_size < 4:
        raise ValueError(
            f"length ({length}) and source_length ({sizes.source_length}) must be at least 1, vocab_size "
            f"({sizes.vocab_size}) at least 4"
        )
    cases = [DecodingCase(sizes, batch, beam_size, length) for batch in batches for beam_size in beams]
    return DecodingPlan(cases, names, arguments.turns(_ROUNDS), arguments.memory)


def parse(arguments: Sequence[str] | None = None) -> DecodingArguments:
    """Parses a command line. Defaults to that of this process."""
    return tyro.cli(DecodingArguments, prog="python -m benchmarks.decoding", args=arguments)


def main(arguments: DecodingArguments) -> int:
    """Prints the table. Returns 1 if our implementation is wrong or fails, else 0."""
    wanted = plan(arguments)
    records = command.show(measure(wanted), len(wanted.cases), TABLE, arguments.json)
    command.plot(records, rates, arguments.plot)
    return int(any(record.status in (WRONG, FAILED) for record in records if record.implementation == "seqattn"))


if __name__ == "__main__":
    environment.command(lambda: main(parse()))
