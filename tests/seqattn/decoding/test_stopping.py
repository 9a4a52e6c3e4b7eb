"""Exact stopping with processors that raise scores, against all sequences there are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn import pytree
from seqattn.decoding import (
    AverageLength,
    Banned,
    ForcedPrefix,
    LogitsProcessor,
    Lowering,
    MinLength,
    MinLogProbability,
    NoPenalty,
    NoRepeatNgram,
    PrefixCost,
    RepetitionPenalty,
    Temperature,
    TopK,
    beam_search,
)
from tests.logits_oracle import expected

V, END, ROWS, MAX_LENGTH, BEAMS = 11, 1, 13, 7, 6


@pytree
@dataclasses.dataclass(frozen=True)
class Adds(LogitsProcessor):
    """Adds `[B, V]` to the logits, and does not say how much that is."""

    amount: jax.Array

    def __call__(self, logits, history):
        return logits + self.amount[:, None]


@pytree
@dataclasses.dataclass(frozen=True)
class AddsAtMost(Adds):
    """The same with its bound, which for some rows is below 0."""

    def bound(self, highest):
        return highest + self.amount.max(axis=-1)


@expected.register
def _adds(processor: Adds, logits, said, row):
    return logits + np.asarray(processor.amount, np.float64)[row]


@pytest.mark.parametrize("kind", [Adds, AddsAtMost])
def test_exact_stopping_is_exact_with_a_processor_that_raises_scores(kind):
    """After the end with 0.4 and another sequence with 0.36, the one with 0.2 is raised in its third step."""
    chances = np.zeros((7, 7))
    chances[6, [1, 2, 4]], chances[2, [1, 2]] = [0.4, 0.4, 0.2], [0.9, 0.1]
    chances[4, 5] = chances[5, 3] = chances[3, 1] = 1
    with np.errstate(divide="ignore"):
        table = jnp.asarray(np.log(chances), jnp.float32)
    processor = kind(5 * jax.nn.one_hot(jnp.array([3]), 7))

    @jax.jit
    def search(processor):
        sizes = {"beam_size": 2, "max_length": 6, "end_token": 1, "length_penalty": NoPenalty()}
        return beam_search(lambda tokens, s: (table[tokens], s), (), jnp.array([6]), processors=(processor,), **sizes)

    found = search(processor)
    assert found.tokens[0, 0, :4].tolist() == [4, 5, 3, 1]
    np.testing.assert_allclose(found.score[0, 0], np.log(0.2) + 5, rtol=1e-6)


def _chains(seed):
    """Log probabilities `[ROWS, V, V]`: token 0 is followed by the end or 3 others, each other by the end or one.

    So at most 3 hypotheses run, and a beam of 6 meets all sequences there are, but 6 have ended long before the limit.
    """
    draw = np.random.default_rng(seed)
    chances = np.zeros((ROWS, V, V))
    for row in range(ROWS):
        chances[row, 0, [END, *draw.choice(np.arange(2, V), 3, replace=False)]] = draw.dirichlet(np.ones(4))
        for token in range(2, V):
            chances[row, token, [END, draw.integers(2, V)]] = draw.dirichlet([2, 1])
    with np.errstate(divide="ignore"):
        return np.log(chances).astype(np.float32)


def _numbers(seed, low, high, *shape):
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, shape), jnp.float32)


def _prefix(seed, cost):
    draw, table = np.random.default_rng(seed), _chains(seed)
    first = [draw.choice(np.flatnonzero(row[0] > -np.inf)) for row in table]
    return ForcedPrefix(jnp.asarray(first)[:, None], jnp.asarray(draw.integers(0, 2, ROWS)), cost)


STACKS = {
    "unknown": lambda seed: (Adds(_numbers(seed, -1, 3, ROWS, V)),),
    "known": lambda seed: (AddsAtMost(_numbers(seed, -1, 3, ROWS, V)),),
    "below 0": lambda seed: (AddsAtMost(_numbers(seed, -1, -0.2, ROWS, V)),),
    "penalty": lambda seed: (RepetitionPenalty(_numbers(seed, 0.2, 2, ROWS)),),
    "penalty of what is raised": lambda seed: (
        AddsAtMost(_numbers(seed, -1, 2, ROWS, V)),
        RepetitionPenalty(_numbers(seed, 0.2, 2, ROWS)),
    ),
    "temperature": lambda seed: (AddsAtMost(_numbers(seed, -2, 9, ROWS, V)), Temperature(_numbers(seed, 0, 2, ROWS))),
    "raised after a temperature": lambda seed: (Temperature(2.0), AddsAtMost(_numbers(seed, 0, 1, ROWS, V))),
    "struck": lambda seed: (
        Banned((seed % 9 + 2,)),
        NoRepeatNgram(2),
        MinLength(jnp.arange(ROWS) % 5, END),
        AddsAtMost(_numbers(seed, -1, 2, ROWS, V)),
        TopK(2),
        MinLogProbability(-3.0),
    ),
    "free prefix": lambda seed: (
        AddsAtMost(_numbers(seed, -3, -1, ROWS, V)),
        _prefix(seed, PrefixCost.NOTHING),
        AddsAtMost(_numbers(seed, 0, 1, ROWS, V)),
    ),
    "prefix": lambda seed: (AddsAtMost(_numbers(seed, -1, 2, ROWS, V)), _prefix(seed, PrefixCost.MODEL)),
}


@functools.partial(jax.jit, static_argnames="max_length")
def _search(tables, processors, penalty, max_length=MAX_LENGTH, row_limit=None):
    def step(tokens, state):
        return tables[state, tokens], state

    sizes = {"beam_size": BEAMS, "n_best": BEAMS, "max_length": max_length, "row_limit": row_limit, "end_token": END}
    rows = jnp.arange(ROWS)
    return beam_search(step, rows, 0 * rows, length_penalty=penalty, processors=processors, **sizes)


def _all_sequences(table, row, processors, penalty, limit):
    """(score, tokens) of every sequence of one row that ends or is cut, best first, in float64."""
    found = []

    def go_on(said, total):
        gains = table[row, said[-1]].astype(np.float64)
        with np.errstate(divide="ignore"):
            gains -= np.log(np.exp(gains).sum())
        for processor in processors:
            gains = expected(processor, gains, said, row) if gains.max() > -np.inf else gains
        for token in np.flatnonzero(gains > -np.inf).tolist():
            if token == END or len(said) == limit:
                found.append(((total + gains[token]) / len(said) ** float(penalty.power), [*said[1:], token]))
            else:
                go_on([*said, token], total + gains[token])

    go_on([0], 0.0)
    return sorted(found, reverse=True)


@pytest.mark.parametrize("name", STACKS)
def test_exact_stopping_is_exhaustive_search_with_any_processors(name):
    for seed, power in enumerate([0.0, 1.0, -0.5, 2.0, 0.3, 1.0]):
        table, processors, penalty = _chains(seed), STACKS[name](seed), AverageLength(power)
        found = _search(table, processors, penalty, row_limit=jnp.arange(ROWS) % 3 + MAX_LENGTH - 2)
        for row in range(ROWS):
            every = _all_sequences(table, row, processors, penalty, row % 3 + MAX_LENGTH - 2)[:BEAMS]
            scores = [score for score, _ in every] + [-np.inf] * (BEAMS - len(every))
            message = f"{name}, seed {seed}, row {row}"
            np.testing.assert_allclose(found.score[row], scores, rtol=1e-4, atol=1e-4, err_msg=message)
            if every:
                assert found.tokens[row, 0, : found.length[row, 0]].tolist() == every[0][1], message


class _Nothing(Lowering):
    def __call__(self, logits, history):
        return logits


class _Silent(LogitsProcessor):
    def __call__(self, logits, history):
        return logits


@pytest.mark.parametrize(
    ("processors", "steps"), [((), 2), ((_Nothing(),), 2), ((_Silent(),), 9)], ids=["none", "bound", "silent"]
)
def test_a_search_goes_on_to_its_end_only_where_a_processor_does_not_say_what_it_adds(processors, steps):
    calls = []

    def step(tokens, state):
        jax.debug.callback(calls.append, tokens, ordered=True)
        return jnp.broadcast_to(jnp.array([-6.0, 0.0, -1.0]), (len(tokens), 3)), state

    sizes = {"beam_size": 2, "max_length": 9, "end_token": 1, "length_penalty": NoPenalty()}
    jax.block_until_ready(beam_search(step, (), jnp.array([0]), processors=processors, **sizes))
    jax.effects_barrier()
    assert len(calls) == steps


def test_a_bound_is_one_number_for_each_row():
    class Wrong(_Silent):
        def bound(self, highest):
            return highest[:1]

    with pytest.raises(ValueError, match=r"bound of Wrong must be one number for each of 2 rows, got the shape \(1,\)"):
        beam_search(
            lambda tokens, state: (jnp.zeros((len(tokens), 3)), state),
            *((), jnp.array([0, 0])),
            **{"beam_size": 2, "max_length": 2, "end_token": 1, "processors": (Wrong(),)},
        )
