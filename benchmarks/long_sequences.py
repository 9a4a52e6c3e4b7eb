"""What one update costs on long texts: full attention, with and without its scores kept, and Liu's compressed one.

    python -m benchmarks.long_sequences --lengths 1000,4000,16000 --json benchmarks/results/long-sequences.jsonl

The decoder of the experiment `docstrings_stream` reads one text of each length and writes a target of 50 tokens behind
it: forward, backward and Adam, in float32. Both ways of full attention, and both of compressed attention, must give the
same loss before they are timed. All take turns in one process: only figures of one run are to be compared.
"""

import math
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx

from benchmarks import command, machine, table
from benchmarks.program import Program, planned
from benchmarks.row import CHECKED, REFUSED, TIMED, WRONG
from benchmarks.timing import Times, interleaved
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
"""What is the same function, computed in two ways."""
_TARGET, _TOLERANCE = 50, 1e-4
_COLUMNS = {"attention": 28, "planned MiB": 12, "ms": 13, "min - max": 19, "loss": 9, "compile s": 10}
_LEGEND = (
    "planned MiB: arguments, results and temporaries of an update, as XLA plans it, with the state before and after "
    "it, which training keeps once. ms: median of the rounds, their range beside it. loss: before the first update; "
    "with and without its scores kept that of an attention must be the same. compile s: once a length, not in ms."
)


@dataclass(frozen=True)
class Arguments:
    """Measures updates on long texts. Lists are words separated by spaces or commas."""

    lengths: command.Words = ("1000", "4000", "16000")
    """Tokens of the text that is read."""
    attentions: command.Words = NAMES
    """Of full-scores-kept, local-compressed-scores-kept (those of its compressed layers), full-tiled and
    local-compressed-tiled (neither scores nor weights are kept), in turn."""
    rounds: int = 5
    """How many turns each has; 0 plans and compares and times nothing."""
    json: Path | None = None
    """File that gets one line of JSON for each row, after what it holds."""


@dataclass(frozen=True)
class UpdateRow:
    """What came of one kind of attention at one length."""

    implementation: str
    length: int
    status: str
    reason: str = ""
    loss: float = math.nan
    planned_bytes: int | None = None
    compile_seconds: float | None = None
    times: Times | None = None

    def record(self) -> dict[str, Any]:
        """Everything, in units without prefixes, with the machine it was measured on."""
        times = self.times
        return {
            "attention": self.implementation,
            "length": self.length,
            "target_length": _TARGET,
            "dtype": "float32",
            "status": self.status,
            "reason": self.reason,
            "loss": None if math.isnan(self.loss) else self.loss,
            "planned_bytes": self.planned_bytes,
            "compile_seconds": self.compile_seconds,
            "median_seconds": times.median if times else None,
            "seconds": times.seconds if times else None,
            **machine.describe(),
        }

    def cells(self) -> list[str]:
        """Texts in the order of the columns."""
        times = self.times
        return [
            self.implementation,
            table.number(self.planned_bytes / 2**20) if self.planned_bytes else "",
            table.number(times.median * 1e3) if times else self.status,
            f"{table.number(min(times.seconds) * 1e3)} - {table.number(max(times.seconds) * 1e3)}" if times else "",
            "" if math.isnan(self.loss) else f"{self.loss:.5f}",
            table.number(self.compile_seconds) if self.compile_seconds else "",
        ]


def measure(lengths: Sequence[int], attentions: Sequence[str], rounds: int) -> Iterator[list[UpdateRow]]:
    """The rows of one length after the other."""
    for length in lengths:
        rows, programs = [], {}
        for name in attentions:
            row, program = attempt(name, length, DOCSTRINGS_STREAM.model)
            rows.append(row)
            if program is not None:
                programs[name] = program
        rows = compare(rows)
        right = {row.implementation: programs[row.implementation] for row in rows if row.status == CHECKED}
        times = interleaved(right, rounds)
        yield [
            replace(row, status=TIMED, times=times[row.implementation]) if times.get(row.implementation) else row
            for row in rows
        ]


def attempt(name: str, length: int, config: Any) -> tuple[UpdateRow, Program | None]:
    """Compiles an update and takes one, where memory suffices."""
    model = build(name, replace(config, vocab_size=2_000))
    optimizer = optax.adam(1e-3)
    graph, state = start(model, optimizer)
    update = jax.jit(make_update(graph, optimizer, SequenceToSequence.loss, seed=0))
    batch = jax.device_put(texts(length))
    begun = time.perf_counter()
    executable = update.lower(state, batch).compile()
    seconds = time.perf_counter() - begun
    row = UpdateRow(name, length, CHECKED, planned_bytes=planned(executable), compile_seconds=seconds)
    try:
        given = sum(leaf.nbytes for leaf in jax.tree.leaves((state, batch)))
        machine.require((row.planned_bytes or 0) - given, "temporaries and results of an update")
    except NotImplementedError as error:
        return replace(row, status=REFUSED, reason=f"{length} tokens: {error}"), None
    program = Program(
        lambda: executable(state, batch), jax.block_until_ready, lambda result: [np.asarray(result[1]["loss"])]
    )
    (loss,) = program.arrays(program.run())
    return replace(row, loss=float(loss)), program


def build(name: str, config: LanguageModelConfig) -> nnx.Module:
    """The decoder with one kind of attention, without dropout."""
    block = replace(config.block, dropout_rate=0.0)
    compressed: Any = DOCSTRINGS_COMPRESSED.model
    pattern = compressed.pattern if name in (COMPRESSED_KEPT, COMPRESSED) else config.pattern
    model = run.build(replace(config, block=block, pattern=pattern), seed=0)
    # Local attention has few scores to keep, T x 256, but as one product the xla kernel would make all of T x T.
    kept: dict[str, type[MultiHeadAttention]] = {KEPT: MultiHeadAttention, COMPRESSED_KEPT: MemoryCompressedAttention}
    model = with_implementation(model, "chunked")
    return with_implementation(model, "xla", of=kept[name]) if name in kept else model


def texts(length: int) -> dict[str, np.ndarray]:
    """A batch of one random text, and one random target."""
    random = np.random.default_rng(length)
    return {
        "source": random.integers(4, 2_000, (1, length), np.int32),
        "target": random.integers(4, 2_000, (1, _TARGET + 1), np.int32),
        "source_length": np.full(1, length, np.int32),
        "target_length": np.full(1, _TARGET + 1, np.int32),
    }


def compare(rows: Sequence[UpdateRow]) -> list[UpdateRow]:
    """The rows; wrong are both of an attention where their losses differ."""
    compared = list(rows)
    for names in _SAME:
        pair = [row for row in rows if row.implementation in names and row.status == CHECKED]
        if len(pair) == 2 and not abs(pair[0].loss - pair[1].loss) <= _TOLERANCE:
            reason = f"{pair[0].length} tokens: losses {pair[0].loss:.6f} and {pair[1].loss:.6f}"
            compared = [replace(row, status=WRONG, reason=reason) if row in pair else row for row in compared]
    return compared


def plan(arguments: Arguments) -> tuple[list[int], list[str]]:
    """Lengths and kinds of attention; raises ValueError for what does not exist."""
    given = command.words(arguments.lengths)
    if not given or not all(word.isdecimal() and int(word) for word in given) or arguments.rounds < 0:
        raise ValueError(
            f"lengths ({', '.join(given)}) must be numbers of at least 1, rounds ({arguments.rounds}) at least 0"
        )
    names = list(command.words(arguments.attentions))
    command.check("attention", names, NAMES)
    return [int(word) for word in given], names


def _lines(rows: Sequence[UpdateRow]) -> list[str]:
    cells = (table.aligned(row.cells(), _COLUMNS, left=("attention",)) for row in rows)
    return [f"{rows[0].length:,} tokens", *cells]


def main(arguments: Arguments) -> int:
    """Prints the table; returns 1 if one is wrong, else 0."""
    lengths, names = plan(arguments)
    header = [table.aligned(list(_COLUMNS), _COLUMNS, left=("attention",))]
    measured = measure(lengths, names, arguments.rounds)
    rows = command.shown(measured, len(lengths), header=header, lines=_lines, json=arguments.json)
    print(*table.notes(rows), *textwrap.wrap(_LEGEND, 120), table.measured_on(), sep="\n")
    return int(any(row.status == WRONG for row in rows))


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.long_sequences")))
