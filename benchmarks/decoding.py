"""What decoding costs, here and elsewhere, with the same weights: `python -m benchmarks.decoding`.

    python -m benchmarks.decoding --short                     # what `make bench-decoding` runs: some minutes
    python -m benchmarks.decoding --memory --json benchmarks/results/decoding.jsonl \\
        --plot benchmarks/results/decoding.png
    python -m benchmarks.decoding --batches 1 --beams 4 --implementations seqattn,ctranslate2 --rounds 21

A MarianMT of random weights (3 + 3 layers of 256, vocabulary 8000) that never ends early, so that all do the same work,
in float32 with all cores that the process may use (`taskset` for fewer). What they say is compared before it is timed;
one whose tokens are others has no time. All take turns in one process: only figures of one run are to be compared.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import command, decoding_chart, decoding_memory, decoding_row, table, translators
from benchmarks.decoding_row import Agreement, DecodingRow
from benchmarks.marian import Case, Model, Sizes
from benchmarks.program import Program
from benchmarks.row import CHECKED, FAILED, TIMED, WRONG, refusal
from benchmarks.timing import Times, interleaved
from benchmarks.translators import PEERS, Translator
from seqattn.coordinates import Coordinates
from seqattn.interop import from_marian
from seqattn.models.transformer import Transformer
from train.devices import environment


@dataclass(frozen=True)
class Arguments:
    """Measures decoding. Lists are words separated by spaces or commas."""

    batches: command.Words = ("1", "64")
    """How many sources are decoded at once."""
    beams: command.Words = ("1", "4")
    """Sizes of the beam; 1 is greedy."""
    implementations: command.Words = tuple(translators.NAMES)
    """Of seqattn, transformers, ctranslate2."""
    length: int = 24
    """Tokens of each target."""
    rounds: int | None = None
    """How many turns each implementation has, 9 by default; 0 compares results and times nothing."""
    json: Path | None = None
    """File that gets one line of JSON for each row, after what it holds."""
    plot: Path | None = None
    """Picture of the tokens a second, written as PNG and as SVG."""
    memory: bool = False
    """Also decode each case once in a process of its own and tell its peak."""
    short: bool = False
    """Fewer rounds, where they are not given."""
    sizes: Sizes = field(default_factory=Sizes)


@dataclass(frozen=True)
class Plan:
    """Arguments, checked, with what was left open filled in."""

    cases: Sequence[Case]
    implementations: Sequence[str]
    rounds: int
    memory: bool


def plan(arguments: Arguments) -> Plan:
    """Raises ValueError for what does not exist."""
    names = command.words(arguments.implementations)
    command.check("implementation", names, tuple(translators.NAMES))
    batches, beams = _numbers("batches", arguments.batches), _numbers("beams", arguments.beams)
    sizes, length = arguments.sizes, arguments.length
    rounds = arguments.rounds if arguments.rounds is not None else 3 if arguments.short else 9
    if rounds < 0 or length < 1 or sizes.source_length < 1 or sizes.vocab_size < 4:
        raise ValueError(
            f"rounds ({rounds}) must be at least 0, length ({length}) and source_length ({sizes.source_length}) at "
            f"least 1, vocab_size ({sizes.vocab_size}) at least 4"
        )
    cases = [Case(sizes, batch, beam_size, length) for batch in batches for beam_size in beams]
    return Plan(cases, names, rounds, arguments.memory)


def _numbers(name: str, given: command.Words) -> list[int]:
    words = command.words(given)
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"{name} ({', '.join(words)}) must be numbers of at least 1")
    return [int(word) for word in words]


@dataclass(frozen=True)
class Attempt:
    """What came of an implementation before anything is timed; programs and tokens only where it works."""

    row: DecodingRow
    whole: Program | None = None
    first: Program | None = None
    """With room for one token."""
    tokens: np.ndarray | None = None


def measure(wanted: Plan) -> Iterator[list[DecodingRow]]:
    """The rows of one case after the other."""
    with tempfile.TemporaryDirectory() as folder:
        model = Model(wanted.cases[0].sizes, Path(folder))
        loaded = {name: load(name, model) for name in wanted.implementations}
        for case in wanted.cases:
            tried = {name: attempt(name, case, translator) for name, translator in loaded.items()}
            checked = compare(tried, model)
            times = take_turns(checked, wanted.rounds)
            yield [_finished(tries.row, times, model.folder if wanted.memory else None) for tries in checked.values()]


def load(name: str, model: Model) -> Translator | Exception:
    """An implementation with the weights, or why there is none."""
    try:
        return translators.NAMES[name](model)
    except Exception as exception:  # of any library: it costs the rows of this one and no other
        return exception


def attempt(name: str, case: Case, translator: Translator | Exception) -> Attempt:
    """Prepares an implementation and decodes once."""
    row = DecodingRow(case, name, CHECKED)
    try:
        if isinstance(translator, Exception):
            raise translator
        whole, first = translator(case), translator(replace(case, length=1))
        (tokens,) = whole.arrays(whole.run())
    except Exception as exception:
        status, reason = refusal(exception)
        return Attempt(replace(row, status=status, reason=reason))
    return Attempt(replace(row, compile_seconds=whole.compile_seconds), whole, first, tokens)


def compare(tried: Mapping[str, Attempt], model: Model) -> dict[str, Attempt]:
    """The attempts with how they agree with the first peer that works, and none that says other things."""
    reference = next((tried[name] for name in PEERS if name in tried and tried[name].tokens is not None), None)
    if reference is None or reference.tokens is None:
        return dict(tried)
    right, right_scores = reference.tokens, scores(model, reference.row.case, reference.tokens)

    def compared(one: Attempt) -> Attempt:
        if one.tokens is None:
            return one
        case, peer = one.row.case, reference.row.implementation
        if one.tokens.shape != right.shape:
            reason = f"{case.name}: tokens of shape {one.tokens.shape}, not {right.shape} as {peer}"
            return Attempt(replace(one.row, status=WRONG, reason=reason))
        agreement = Agreement.of(one.tokens, scores(model, case, one.tokens), right, right_scores)
        row = replace(one.row, agreement=agreement)
        if agreement.is_right(case.beam_size):
            return replace(one, row=row)
        reason = f"{case.name}: {agreement.equal:.1%} of the rows are equal to those of {peer}"
        return Attempt(
            replace(row, status=WRONG, reason=f"{reason}, scores differ by {agreement.score_difference:.1g}")
        )

    return {name: compared(one) for name, one in tried.items()}


def scores(model: Model, case: Case, tokens: np.ndarray) -> np.ndarray:
    """The mean log probability of a token of each row `[B]`, by our model, all tokens at once."""
    source = jnp.asarray(case.sources())
    start = jnp.full((case.batch, 1), case.sizes.pad_token)
    target = jnp.concatenate([start, jnp.asarray(tokens)[:, :-1]], axis=1)
    logits = _decode(from_marian(model.config, model.arrays), source, target)
    log_probabilities = jax.nn.log_softmax(logits)
    return np.asarray(jnp.take_along_axis(log_probabilities, jnp.asarray(tokens)[..., None], axis=-1).mean(axis=(1, 2)))


@nnx.jit
def _decode(transformer: Transformer, source: jax.Array, target: jax.Array) -> jax.Array:
    def whole(tokens: jax.Array) -> Coordinates:
        return Coordinates.from_lengths(jnp.full(len(tokens), tokens.shape[1]), tokens.shape[1])

    return transformer.decode(target, whole(target), transformer.encode(source, whole(source)))


def take_turns(tried: Mapping[str, Attempt], rounds: int) -> dict[tuple[str, str], Times]:
    """Times of whole sequences and of first tokens, by implementation."""
    programs = {(name, "whole"): one.whole for name, one in tried.items() if one.whole}
    programs |= {(name, "first"): one.first for name, one in tried.items() if one.first}
    return interleaved(programs, rounds)


def _finished(row: DecodingRow, times: Mapping[tuple[str, str], Times], folder: Path | None) -> DecodingRow:
    """A row with what was measured; its memory, too, where a folder is given."""
    name = row.implementation
    if (name, "whole") in times:
        peers = {peer: times[peer, "whole"] for peer in PEERS if (peer, "whole") in times}
        whole, first = times[name, "whole"], times[name, "first"]
        row = replace(row, status=TIMED, times=whole, first=first, peers=peers)
    if folder is None or row.status not in (CHECKED, TIMED):
        return row
    try:
        return replace(row, peak=decoding_memory.peak(row.case, name, folder))
    except RuntimeError as error:
        return replace(row, reason=f"peak memory unknown: {error}")


def parse(arguments: Sequence[str] | None = None) -> Arguments:
    """What a command line asks for; that of this process by default."""
    return tyro.cli(Arguments, prog="python -m benchmarks.decoding", args=arguments)


def main(arguments: Arguments) -> int:
    """Prints the table; returns 1 if ours is wrong or fails, else 0."""
    wanted = plan(arguments)
    options: dict[str, Any] = {"header": decoding_row.header(), "lines": decoding_row.lines, "json": arguments.json}
    rows = command.shown(measure(wanted), len(wanted.cases), **options)
    print(*table.notes(rows), *decoding_row.footer(), sep="\n")
    if arguments.plot:
        print(*decoding_chart.rates(rows, arguments.plot), sep="\n")
    return int(any(row.status in (WRONG, FAILED) for row in rows if row.implementation == "seqattn"))


if __name__ == "__main__":
    environment.command(lambda: main(parse()))
