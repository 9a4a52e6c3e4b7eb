r"""Benchmarks updates on long texts: full and memory-compressed attention, each with and without stored scores.

    python -m benchmarks.training.long_sequences --lengths 1000,4000,16000 \
        --json benchmarks/results/long-sequences.jsonl

The decoder of the experiment `docstrings_stream` trains on one text of each length, followed by a target of 50 tokens:
forward pass, backward pass and Adam, in float32. The compressed attention is that of Liu 2018. Both variants of full
attention, and both of compressed attention, must give the same loss before they are timed. All take turns in one
process, so compare only numbers of the same run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx

from benchmarks.bench import command, table
from benchmarks.bench.attempt import WHOLE, Attempt, take_turns, timed
from benchmarks.bench.program import compiled, require_memory
from benchmarks.bench.record import CHECKED, REFUSED, WRONG, Record
from benchmarks.bench.table import Column, Table
from seqattn.models import LanguageModelConfig
from seqattn.nn import MemoryCompressedAttention, MultiHeadAttention, with_implementation
from train.checkpoints import run
from train.devices import environment
from train.experiments.docstrings_compressed import DOCSTRINGS_COMPRESSED
from train.experiments.docstrings_stream import DOCSTRINGS_STREAM
from train.objectives import SequenceToSequence
from train.update.step import make_update, start

KEPT, TILED = "full-scores-kept", "full-tiled"
COMPRESSED_KEPT, COMPRESSED = "local-compressed-scores-kept", "local-compressed-tiled"
NAMES = (KEPT, COMPRESSED_KEPT, TILED, COMPRESSED)
_SAME = ((KEPT, TILED), (COMPRESSED_KEPT, COMPRESSED))
"""Pairs that compute the same function in two ways."""
_TARGET, _TOLERANCE, _ROUNDS = 50, 1e-4, 5
_LEGEND = (
    "planned MiB: arguments, results and temporaries of an update in XLA's plan, including the state before and after "
    "it, which training keeps once. ms: median over the rounds, with their range. loss: before the first update; must "
    "be the same with and without stored scores. compile s: once per length, not part of ms."
)


@dataclass(frozen=True)
class LongSequenceArguments(command.Arguments):
    """Measures updates on long texts, in 5 rounds.

    Lists are words separated by spaces or commas.
    """

    lengths: command.Words = ("1000", "4000", "16000")
    """Numbers of tokens of the text."""
    attentions: command.Words = NAMES
    """Any of full-scores-kept, local-compressed-scores-kept (stores the scores of its compressed layers), full-tiled
    and local-compressed-tiled (store neither scores nor weights), in this order.
    """


@dataclass(frozen=True)
class LongSequenceCase:
    """An update on one text of this length."""

    length: int

    @property
    def name(self) -> str:
        """For example "4,000 tokens"."""
        return f"{self.length:,} tokens"

    def fields(self) -> dict[str, Any]:
        """Returns lengths and dtype."""
        return {"length": self.length, "target_length": _TARGET, "dtype": "float32"}


@dataclass(frozen=True, kw_only=True)
class LongSequenceRecord(Record):
    """A record of a kind of attention, with the loss before the first update."""

    case: LongSequenceCase
    loss: float = math.nan

    def own_fields(self) -> dict[str, Any]:
        """Returns the kind of attention and its loss."""
        return {"attention": self.implementation, "loss": None if math.isnan(self.loss) else self.loss}


TABLE = Table[LongSequenceRecord](
    (
        Column("attention", 28, table.implementation, left=True),
        Column("planned MiB", 12, table.planned_mebibytes),
        Column("ms", 13, table.milliseconds),
        Column("min - max", 19, table.milliseconds_range),
        Column("loss", 9, lambda record: "" if math.isnan(record.loss) else f"{record.loss:.5f}"),
        Column("compile s", 10, table.compile_seconds),
    ),
    lambda record: record.case.name,
    _LEGEND,
)

LongSequenceAttempt = Attempt[LongSequenceRecord]


def measure(lengths: Sequence[int], attentions: Sequence[str], rounds: int) -> Iterator[list[LongSequenceRecord]]:
    """Yields the records of one length at a time."""
    for length in lengths:
        tried = compare([attempt(name, length, DOCSTRINGS_STREAM.model) for name in attentions])
        times = take_turns(tried, rounds)
        yield [timed(one.record, times) for one in tried]


def attempt(name: str, length: int, config: Any) -> LongSequenceAttempt:
    """Compiles an update and makes one, if memory suffices."""
    model = build(name, replace(config, vocab_size=2_000))
    optimizer = optax.adam(1e-3)
    graph, state = start(model, optimizer)
    update = make_update(graph, optimizer, SequenceToSequence.loss, seed=0)
    batch = jax.device_put(texts(length))
    program = compiled(update, state, batch)
    program = replace(program, arrays=lambda result: [np.asarray(result[1]["loss"])])
    record = LongSequenceRecord(case=LongSequenceCase(length), implementation=name).prepared(program)
    try:
        require_memory(program, state, batch)
    except NotImplementedError as error:
        return Attempt(replace(record, status=REFUSED, reason=f"{record.case.name}: {error}"))
    (loss,) = program.arrays(program.run())
    return Attempt(replace(record, loss=float(loss)), {WHOLE: program})


def build(name: str, config: LanguageModelConfig) -> nnx.Module:
    """Returns the decoder with one kind of attention, without dropout."""
    block = replace(config.block, dropout_rate=0.0)
    compressed: Any = DOCSTRINGS_COMPRESSED.model
    pattern = compressed.pattern if name in (COMPRESSED_KEPT, COMPRESSED) else config.pattern
    model = run.build(replace(config, block=block, pattern=pattern), seed=0)
    # Local attention has only T x 256 scores, but the xla kernel would compute T x T in one product.
    kept: dict[str, type[MultiHeadAttention]] = {KEPT: MultiHeadAttention, COMPRESSED_KEPT: MemoryCompressedAttention}
    model = with_implementation(model, "chunked")
    return with_implementation(model, "xla", of=kept[name]) if name in kept else model


def texts(length: int) -> dict[str, np.ndarray]:
    """Returns a batch of one random text and one random target."""
    random = np.random.default_rng(length)
    return {
        "source": random.integers(4, 2_000, (1, length), np.int32),
        "target": random.integers(4, 2_000, (1, _TARGET + 1), np.int32),
        "source_length": np.full(1, length, np.int32),
        "target_length": np.full(1, _TARGET + 1, np.int32),
    }


def compare(tried: Sequence[LongSequenceAttempt]) -> list[LongSequenceAttempt]:
    """Marks both variants of an attention as wrong if their losses differ."""
    compared = list(tried)
    for names in _SAME:
        pair = [one for one in tried if one.record.implementation in names and one.record.status == CHECKED]
        losses = [one.record.loss for one in pair]
        if len(pair) == 2 and not abs(losses[0] - losses[1]) <= _TOLERANCE:
            reason = f"losses {losses[0]:.6f} and {losses[1]:.6f}"
            compared = [one.wrong(reason) if one in pair else one for one in compared]
    return compared


def plan(arguments: LongSequenceArguments) -> tuple[list[int], list[str], int]:
    """Returns lengths, kinds of attention and rounds. Raises ValueError for unknown names and bad numbers."""
    names = list(command.words(arguments.attentions))
    command.check("attention", names, NAMES)
    return command.numbers("lengths", arguments.lengths), names, arguments.turns(_ROUNDS)


def main(arguments: LongSequenceArguments) -> int:
    """Prints the table. Returns 1 if any result is wrong, else 0."""
    lengths, names, rounds = plan(arguments)
    records = command.show(measure(lengths, names, rounds), len(lengths), TABLE, arguments.json)
    return int(any(record.status == WRONG for record in records))


if __name__ == "__main__":
    environment.command(
        lambda: main(tyro.cli(LongSequenceArguments, prog="python -m benchmarks.training.long_sequences"))
    )
