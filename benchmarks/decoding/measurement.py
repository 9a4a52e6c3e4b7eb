"""Measures decoding: decodes each case, compares the tokens with another library, and times equal results."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.bench.attempt import WHOLE, Attempt, take_turns, timed
from benchmarks.bench.marian import RandomMarian
from benchmarks.bench.record import TIMED
from benchmarks.bench.timing import Times
from benchmarks.decoding import memory
from benchmarks.decoding.case import DecodingCase
from benchmarks.decoding.implementations import NAMES, PEERS, Translator
from benchmarks.decoding.record import Agreement, DecodingRecord
from seqattn.coordinates import Coordinates
from seqattn.interop.huggingface import from_huggingface
from seqattn.models.transformer import Transformer

DecodingAttempt = Attempt[DecodingRecord]
"""An attempt; its result is the tokens `[B, L]`."""
_FIRST = "first"
"""The part that decodes a single token."""


@dataclass(frozen=True)
class DecodingPlan:
    """What to measure, and how."""

    cases: Sequence[DecodingCase]
    implementations: Sequence[str]
    rounds: int
    memory: bool


def measure(plan: DecodingPlan) -> Iterator[list[DecodingRecord]]:
    """Yields the records of one case at a time."""
    with tempfile.TemporaryDirectory() as folder:
        model = RandomMarian(plan.cases[0].sizes, Path(folder))
        loaded = {name: load(name, model) for name in plan.implementations}
        for case in plan.cases:
            tried = compare([attempt(name, case, translator) for name, translator in loaded.items()], model)
            times = take_turns(tried, plan.rounds)
            yield [_finished(one.record, times, model.folder if plan.memory else None) for one in tried]


def load(name: str, model: RandomMarian) -> Translator | Exception:
    """Returns an implementation with the weights, or the exception that loading raised."""
    try:
        return NAMES[name](model)
    except Exception as exception:  # a failure of one library must not end the run
        return exception


def attempt(name: str, case: DecodingCase, translator: Translator | Exception) -> DecodingAttempt:
    """Prepares an implementation and decodes once."""
    record = DecodingRecord(case=case, implementation=name)
    try:
        if isinstance(translator, Exception):
            raise translator
        whole, first = translator(case), translator(replace(case, length=1))
        (tokens,) = whole.arrays(whole.run())
    except Exception as exception:
        return Attempt(record.refused(exception))
    return Attempt(record.prepared(whole), {WHOLE: whole, _FIRST: first}, tokens)


def compare(tried: Sequence[DecodingAttempt], model: RandomMarian) -> list[DecodingAttempt]:
    """Adds each attempt's agreement with the first other library that works; marks differing ones as wrong."""
    working = {one.record.implementation: one for one in tried if one.result is not None}
    peer = next((name for name in PEERS if name in working), None)
    if peer is None:
        return list(tried)
    right, case = working[peer].result, working[peer].record.case
    right_scores = scores(model, case, right)

    def compared(one: DecodingAttempt) -> DecodingAttempt:
        if one.result is None:
            return one
        if one.result.shape != right.shape:
            return one.wrong(f"tokens of shape {one.result.shape}, not {right.shape} as {peer}")
        agreement = Agreement.of(one.result, scores(model, case, one.result), right, right_scores)
        one = replace(one, record=replace(one.record, agreement=agreement))
        if agreement.is_right(case.beam_size):
            return one
        equal = f"{agreement.equal:.1%} of the rows are equal to those of {peer}"
        return one.wrong(f"{equal}, scores differ by {agreement.score_difference:.1g}")

    return [compared(one) for one in tried]


def scores(model: RandomMarian, case: DecodingCase, tokens: np.ndarray) -> np.ndarray:
    """Returns the mean log probability per token of each row `[B]` under our model, all tokens at once."""
    source = jnp.asarray(case.sources())
    start = jnp.full((case.batch, 1), case.sizes.pad_token)
    target = jnp.concatenate([start, jnp.asarray(tokens)[:, :-1]], axis=1)
    logits = _decode(from_huggingface(model.config, model.arrays), source, target)
    log_probabilities = jax.nn.log_softmax(logits)
    return np.asarray(jnp.take_along_axis(log_probabilities, jnp.asarray(tokens)[..., None], axis=-1).mean(axis=(1, 2)))


@nnx.jit
def _decode(transformer: Transformer, source: jax.Array, target: jax.Array) -> jax.Array:
    def whole(tokens: jax.Array) -> Coordinates:
        return Coordinates.from_lengths(jnp.full(len(tokens), tokens.shape[1]), tokens.shape[1])

    return transformer.decode(target, whole(target), transformer.encode(source, whole(source)))


def _finished(record: DecodingRecord, times: Mapping[tuple[str, str], Times], folder: Path | None) -> DecodingRecord:
    """Returns the record with its times; with its memory, too, if a folder is given."""
    name, record = record.implementation, timed(record, times)
    if record.status == TIMED:
        peers = {peer: times[peer, WHOLE] for peer in PEERS if (peer, WHOLE) in times}
        record = replace(record, first=times[name, _FIRST], peers=peers)
    return record.with_peak(lambda: memory.peak(record.case, name, folder)) if folder is not None else record
