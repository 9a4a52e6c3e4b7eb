"""Greedy generation against a loop in Python, over step functions that are no model."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seqattn.decoding import Generated, generate

V, END, PAD, MAX_LENGTH = 7, 3, 5, 11
FIRST = jnp.array([0, 1, 2, 6, 4])
TABLE = (3 * np.random.default_rng(2).normal(size=(V, V, V))).astype(np.float32)


def _by_table(tokens, state):
    """Logits from a table over the last two tokens; the state is a pytree: the token before, and a counter."""
    logits = state["table"][0, state["before"], tokens]
    return logits, {"table": state["table"], "before": tokens, "count": (state["count"][0] + 1,)}


def _state(table=TABLE, batch=5):
    table = jnp.broadcast_to(jnp.asarray(table), (batch, *table.shape))
    return {"table": table, "before": jnp.zeros(batch, jnp.int32), "count": (jnp.zeros(batch, jnp.int32),)}


@functools.partial(jax.jit, static_argnames=("step", "max_length"))
def _generate(step, state, first, max_length=MAX_LENGTH) -> Generated:
    return generate(step, state, first, max_length=max_length, end_token=END, pad_token=PAD)


def _loop(table: np.ndarray, first: int, max_length: int) -> tuple[list[int], float, bool, bool]:
    """One row: its tokens, their log probability, whether it ended and whether it failed."""
    before, last, tokens, total = 0, first, [], 0.0
    for _ in range(max_length):
        logits = table[before, last].astype(np.float64)
        if np.isnan(logits).any() or not np.isfinite(logits.max()):
            return tokens, total, False, True
        token = int(np.argmax(logits))  # the first of equal ones
        total += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        tokens.append(token)
        if token == END:
            return tokens, total, True, False
        before, last = last, token
    return tokens, total, False, False


def _agree(found: Generated, table: np.ndarray, first=FIRST, max_length: int = MAX_LENGTH) -> None:
    for row, token in enumerate(np.asarray(first)):
        tokens, total, ended, failed = _loop(table, int(token), max_length)
        padded = tokens + [PAD] * (max_length - len(tokens))
        np.testing.assert_array_equal(found.tokens[row], padded, err_msg=f"row {row}")
        assert (found.length[row], found.ended[row], found.failed[row]) == (len(tokens), ended, failed), f"row {row}"
        np.testing.assert_allclose(found.log_probability[row], total, rtol=1e-5, atol=1e-6)


def _long_lived(seed: int) -> np.ndarray:
    """A table after which some rows end, each after another number of tokens, and some do not."""
    table = 3 * np.random.default_rng(seed).normal(size=(V, V, V)).astype(np.float32)
    table[..., END] += 1
    return table


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_a_loop_over_the_largest_logit(seed):
    table = _long_lived(seed)
    _agree(_generate(_by_table, _state(table), FIRST), table)


def test_the_tables_of_this_file_hold_every_case():
    rows = [_loop(_long_lived(seed), int(first), MAX_LENGTH) for seed in range(6) for first in FIRST]
    lengths = {len(tokens) for tokens, _, ended, _ in rows if ended}
    assert {ended for _, _, ended, _ in rows} == {True, False}
    assert 1 in lengths
    assert len(lengths) > 3


def test_eager_is_jitted():
    eager = generate(_by_table, _state(), FIRST, max_length=MAX_LENGTH, end_token=END, pad_token=PAD)
    for ours, theirs in zip(*(jax.tree.leaves(x) for x in (eager, _generate(_by_table, _state(), FIRST))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_max_length_is_reached_and_no_more():
    table = np.zeros((V, V, V), np.float32)
    table[..., 6] = 1
    for max_length in (1, 4):
        found = _generate(_by_table, _state(table), FIRST, max_length)
        _agree(found, table, max_length=max_length)
        assert np.all(found.tokens == 6)
        assert not np.any(found.ended)


def test_b12_nothing_but_padding_follows_the_one_end_token():
    found = _generate(_by_table, _state(_long_lived(1)), FIRST)
    for tokens, length, ended in zip(*(np.asarray(x) for x in (found.tokens, found.length, found.ended)), strict=True):
        assert np.all(tokens[length:] == PAD)
        assert (tokens == END).sum() == ended
        assert not ended or tokens[length - 1] == END


def _count_down(tokens, state):
    """A token one less at every step; every call of a step is counted by a callback, in the order of the calls."""
    jax.debug.callback(_CALLS.append, tokens, ordered=True)
    return jax.nn.one_hot(tokens - 1, 20), state


_CALLS: list = []


@pytest.mark.parametrize(
    ("first", "steps"), [([5, 9, 4], 6), ([4, 4, 4], 1), ([19, 4, 4], 16), ([2, 4, 4], 17)], ids=str
)
def test_the_loop_stops_when_every_row_has_ended(first, steps):
    _CALLS.clear()
    found = _generate(_count_down, (), jnp.array(first), 17)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert len(_CALLS) == steps == max(found.length)
    # What has ended is fed padding: a step function must bear that token, but what it says of it is not used.
    fed = np.array(_CALLS)
    for row, length in enumerate(found.length):
        assert np.all(fed[length + 1 :, row] == PAD)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_b15_of_equal_logits_the_lowest_token_is_taken(dtype):
    logits = np.array([[0, 2, 1, -1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1], [2, 2, -9, 2.001, 2, 2, 2]]).astype(dtype)
    found = _generate(lambda tokens, state: (state, state), jnp.asarray(logits), FIRST[:3], 2)
    same_in_bfloat16 = [0, 0] if dtype == ml_dtypes.bfloat16 else [END, PAD]
    np.testing.assert_array_equal(found.tokens, [[1, 1], [0, 0], same_in_bfloat16])
    assert found.log_probability.dtype == jnp.float32


@pytest.mark.parametrize("spoilt", [[0, np.nan], [1, np.inf], [np.nan, -np.inf], [-np.inf] * V], ids=str)
def test_b14_logits_that_say_nothing_fail_their_row_alone(spoilt):
    table = np.zeros((V, V, V), np.float32)
    table[:, :, 6] = 1
    table[:, 6] = [0, 0, 0, 0, 1, 0, 0]  # so every row goes on 6 4 6 4 ...
    table[0, 1, : len(spoilt)] = spoilt  # the second row at its first step
    table[2, 6, : len(spoilt)] = spoilt  # the third at its second
    found = _generate(_by_table, _state(table), FIRST)
    _agree(found, table)
    np.testing.assert_array_equal(found.failed, [False, True, True, False, False])
    np.testing.assert_array_equal(found.length, [MAX_LENGTH, 0, 1, MAX_LENGTH, MAX_LENGTH])
    assert np.all(np.isfinite(found.log_probability))


def test_impossible_tokens_of_minus_infinity_do_not_fail_a_row():
    table = TABLE.copy()
    table[..., 4:] = -np.inf
    found = _generate(_by_table, _state(table), FIRST)
    _agree(found, table)
    assert not np.any(found.failed)


def test_logits_after_the_end_are_not_looked_at():
    def step(tokens, state):
        logits = jnp.where((tokens == PAD)[:, None], jnp.nan, jax.nn.one_hot(tokens - 1, V))
        return logits, state

    # The second reaches token 5, which is the padding; the third goes on with token 0 to the end.
    found = _generate(step, (), jnp.array([4, 6, 1]))
    np.testing.assert_array_equal(found.tokens[0], [END] + [PAD] * (MAX_LENGTH - 1))
    np.testing.assert_array_equal(found.failed, [False, True, False])
    assert np.all(np.isfinite(found.log_probability))


def test_it_stops_when_every_row_ended_or_failed():
    _CALLS.clear()

    def step(tokens, state):
        jax.debug.callback(_CALLS.append, tokens, ordered=True)
        return jnp.where(tokens[:, None] == 1, jnp.nan, jax.nn.one_hot(jnp.full_like(tokens, END), V)), state

    found = _generate(step, (), jnp.array([0, 1, 2]))
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert len(_CALLS) == 1
    np.testing.assert_array_equal(found.failed, [False, True, False])
    np.testing.assert_array_equal(found.length, [1, 0, 1])


def test_many_batches_are_one_program():
    traced = []

    @jax.jit
    def decode(state, first):
        def step(tokens, state):
            traced.append(1)
            return _by_table(tokens, state)

        return generate(step, state, first, max_length=MAX_LENGTH, end_token=END, pad_token=PAD)

    for seed in range(3):
        decode(_state(_long_lived(seed)), FIRST)
        if seed == 0:
            traced_once = len(traced)
    assert len(traced) == traced_once


def test_rows_do_not_depend_on_their_neighbours():
    together = _generate(_by_table, _state(_long_lived(1)), FIRST)
    for row in range(len(FIRST)):
        alone = _generate(_by_table, _state(_long_lived(1), 1), FIRST[row : row + 1])
        for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(ours[row], theirs[0])


def test_a_batch_of_nothing():
    found = _generate(_by_table, _state(batch=0), FIRST[:0])
    assert (found.tokens.shape, found.length.shape) == ((0, MAX_LENGTH), (0,))


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8])
def test_first_tokens_of_any_integer_dtype(dtype):
    """Also NumPy's, and of too few bits for the tokens that follow."""
    found = generate(_count_down_from_300, (), np.array([0, 1]).astype(dtype), max_length=3, end_token=END)
    np.testing.assert_array_equal(found.tokens, [[300, 299, 298]] * 2)
    assert found.tokens.dtype == jnp.int32


def _count_down_from_300(tokens, state):
    return jax.nn.one_hot(jnp.where(tokens > 1, tokens - 1, 300), 301), state


def test_b9_end_and_padding_must_differ():
    with pytest.raises(ValueError, match="end_token and pad_token must differ, both are 3"):
        generate(_by_table, _state(), FIRST, max_length=2, end_token=3, pad_token=3)


@pytest.mark.parametrize("max_length", [0, -1])
def test_at_least_one_token_is_asked_for(max_length):
    with pytest.raises(ValueError, match=rf"max_length \({max_length}\) must be an integer of at least 1"):
        generate(_by_table, _state(), FIRST, max_length=max_length, end_token=END)
