"""Steps, pieces and hypotheses of every model give what the model gives for a whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.decoding import beam_search, generate
from seqattn.hypotheses import branch, select
from seqattn.models import Transformer
from tests.encoder_decoders import (
    BATCH,
    CACHED,
    CONFIGS,
    ONE_OF_EACH,
    REAL,
    SELDOM,
    TARGET,
    B,
    T,
    V,
    decode,
    logits_of,
    model_of,
    most_models,
    one_of_each,
)

# Its many lengths are many programs; of each kind of cache there is a test of its own.
few_models = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SELDOM or "compressed" in name else ()) for name in CONFIGS],
)
# Of the others, some for what steps and caches share, and all for what a model must never do.
cached_models = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SELDOM and name not in CACHED else ()) for name in CONFIGS],
)
one_of_two = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("language")) for name in ONE_OF_EACH]
)


@jax.jit
def _steps(model, source, source_at, tokens):
    """Logits `[T, B, V]` of tokens `[T, B]` step by step."""

    def step(state, tokens):
        logits, state = model.step(tokens, state)
        return state, logits

    return jax.lax.scan(step, model.start(model.encode(source, source_at), T), tokens)[1]


@cached_models
def test_cached_steps_are_decode(name):
    logits = _steps(model_of(name), *BATCH[:2], BATCH[2].T)
    np.testing.assert_allclose(np.asarray(logits).swapaxes(0, 1)[REAL], logits_of(name)[REAL], atol=1e-5)


@jax.jit
def _prefilled(model, source, source_at, pieces):
    """Logits of the tokens of each (tokens, lengths), one call each, and then of one token 7 for all rows."""
    state, found = model.start(model.encode(source, source_at), 3 * T), []
    for tokens, lengths in pieces:
        logits, state = model.prefill(tokens, lengths, state)
        found.append(logits)
    return found, model.step(jnp.full(len(source), 7), state)[0]


@few_models
def test_a_target_comes_in_ragged_pieces_of_any_size(name):
    """Row by row what `decode` gives, though the pieces leave padding of their own between the tokens of a row."""
    lengths = [np.array([2, 1, 4, 0]), np.array([1, 2, 0, 1]), np.array([2, 0, 0, 0])]
    starts = np.cumsum([np.zeros(B, int), *lengths], axis=0)
    pieces = []
    for count, start in zip(lengths, starts, strict=False):
        piece = np.full((B, count.max()), -1, np.int32)  # -1: no token, must not be looked up
        for row in range(B):
            piece[row, : count[row]] = TARGET[row, start[row] : start[row] + count[row]]
        pieces.append((jnp.asarray(piece), jnp.asarray(count)))
    found, last = _prefilled(model_of(name), *BATCH[:2], pieces)
    for logits, count, start in zip(found, lengths, starts, strict=False):
        for row in range(B):
            wanted = logits_of(name)[row, start[row] : start[row] + count[row]]
            np.testing.assert_allclose(logits[row, : count[row]], wanted, atol=1e-5)
    whole = np.full((B, T + 1), 7, np.int32)
    for row in range(B):
        whole[row, : starts[-1][row]] = TARGET[row, : starts[-1][row]]
    wanted = decode(model_of(name), *BATCH[:2], jnp.asarray(whole), Coordinates.from_lengths([T + 1] * B, T + 1))
    np.testing.assert_allclose(last, wanted[np.arange(B), starts[-1]], atol=1e-5)


BEAMS = 2
PARENTS = np.random.default_rng(4).integers(0, BEAMS, (T, B, BEAMS))


@jax.jit
def _hypotheses(model, source, source_at, tokens, parents):
    """Logits `[T, B * beams, V]` of tokens `[T, B * beams]`; after each step hypotheses go on from their parents."""

    def step(state, given):
        tokens, parent = given
        logits, state = model.step(tokens, state)
        return select(state, parent), logits

    state = branch(model.start(model.encode(source, source_at), T), BEAMS)
    return jax.lax.scan(step, state, (tokens, parents))[1]


@most_models
def test_hypotheses_of_a_row_part_and_take_each_others_place(name):
    """As in a beam search, against each history decoded as a whole."""
    tokens = np.random.default_rng(5).integers(0, V, (T, B, BEAMS)).astype(np.int32)
    logits = _hypotheses(model_of(name), *BATCH[:2], jnp.asarray(tokens.reshape(T, -1)), jnp.asarray(PARENTS))
    history, histories = np.zeros((B, BEAMS, T), np.int32), []
    for t in range(T):
        history[:, :, t] = tokens[t]
        histories.append(history.reshape(-1, T).copy())
        history = np.take_along_axis(history, PARENTS[t][:, :, None], axis=1)
    source, at = (jax.tree.map(lambda x: np.tile(np.repeat(x, BEAMS, axis=0), (T, 1)), x) for x in BATCH[:2])
    target_at = Coordinates.from_lengths([T] * len(source), T)
    whole = decode(model_of(name), jnp.asarray(source), at, jnp.asarray(np.concatenate(histories)), target_at)
    wanted = np.asarray(whole).reshape(T, B * BEAMS, T, V)[np.arange(T), :, np.arange(T)]
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


@one_of_two
def test_a_state_says_how_many_hypotheses_it_has(name):
    model = model_of(name)

    def misuse(call):
        state = branch(model.start(model.encode(*BATCH[:2]), T), BEAMS)
        return jax.eval_shape(lambda: call(state))

    with pytest.raises(ValueError, match="prefill before branching"):
        misuse(lambda state: model.prefill(BATCH[2], jnp.full(B, T), state))
    if isinstance(model, Transformer):
        with pytest.raises(ValueError, match=f"the state has {B} rows of {BEAMS} hypotheses, got {B} tokens"):
            misuse(lambda state: model.step(jnp.zeros(B, jnp.int32), state))


@most_models
def test_a15_a_beam_of_no_rows(name):
    def search(model):
        at = Coordinates(jnp.zeros((0, 3), jnp.int32), jnp.ones((0, 3), jnp.int32))
        state, first = model.start(model.encode(jnp.zeros((0, 3), jnp.int32), at), 4), jnp.zeros(0, jnp.int32)
        return beam_search(model.step, state, first, beam_size=3, max_length=4, end_token=1).tokens

    assert jax.eval_shape(search, model_of(name)).shape == (0, 1, 4)


@one_of_each
def test_greedy_generation_takes_the_largest_logit_of_decode(name):
    end, pad = 1, 0

    @jax.jit
    def found(model, source, source_at, first):
        state = model.start(model.encode(source, source_at), T)
        return generate(model.step, state, first, max_length=T, end_token=end, pad_token=pad)

    result = found(model_of(name), *BATCH[:2], BATCH[2][:, 0])
    fed = jnp.concatenate([BATCH[2][:, :1], result.tokens[:, :-1]], axis=1)
    logits = np.asarray(decode(model_of(name), *BATCH[:2], fed, Coordinates.from_lengths(result.length, T)))
    total = np.zeros(B)
    for row, length in enumerate(np.asarray(result.length)):
        np.testing.assert_array_equal(result.tokens[row, :length], logits[row, :length].argmax(axis=-1))
        total[row] = np.asarray(jax.nn.log_softmax(logits[row, :length])).max(axis=-1).sum()
    np.testing.assert_allclose(result.log_probability, total, rtol=1e-4, atol=1e-4)
    assert not np.any(result.failed)
