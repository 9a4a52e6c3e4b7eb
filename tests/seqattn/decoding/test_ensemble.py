"""Means of members against NumPy, and ensembles in the loops that decode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.decoding import Average, ensemble, generate
from seqattn.decoding.beam import beam_search
from tests.logits_oracle import probabilities

V, END, PAD, MEMBERS = 7, 3, 5, 3
FIRST = np.array([0, 1, 2, 6, 4])


def _table(seed: int) -> np.ndarray:
    table = 2 * np.random.default_rng(seed).normal(size=(V, V)).astype(np.float32)
    table[1, seed] = -np.inf
    return table


TABLES = [_table(seed) for seed in range(MEMBERS)]


def _member(tokens, state):
    """The state holds a table, and counts the calls of each row."""
    return state["table"][tokens], {"table": state["table"], "calls": state["calls"] + 1}


def _states(tables=TABLES):
    return tuple({"table": jnp.asarray(table), "calls": jnp.zeros(len(FIRST), jnp.int32)} for table in tables)


def _mean(row: int, average: Average, tables=TABLES) -> np.ndarray:
    """Log of the mean of the members' probabilities behind token `row`, float64."""
    each = np.array([probabilities(table[row].astype(np.float64)) for table in tables])
    with np.errstate(divide="ignore"):
        return np.log(each.mean(axis=0)) if average is Average.PROBABILITY else np.log(each).mean(axis=0)


@pytest.mark.parametrize("average", Average)
def test_its_logits_are_the_logarithm_of_the_mean(average):
    logits, states = ensemble(*[_member] * MEMBERS, average=average)(jnp.asarray(FIRST), _states())
    np.testing.assert_allclose(logits, [_mean(token, average) for token in FIRST], rtol=1e-5, atol=1e-6)
    assert [np.asarray(state["calls"]).tolist() for state in states] == [[1] * len(FIRST)] * MEMBERS
    impossible = np.isneginf(logits[1])
    assert impossible.sum() == (0 if average is Average.PROBABILITY else MEMBERS)


def test_members_are_weighed_by_what_they_say_not_by_the_size_of_their_logits():
    shifted = [TABLES[0] + 1000, TABLES[1] - 1000]
    step = ensemble(_member, _member)
    moved, _ = step(jnp.asarray(FIRST), _states(shifted))
    np.testing.assert_allclose(moved, step(jnp.asarray(FIRST), _states(TABLES[:2]))[0], atol=1e-3)


@pytest.mark.parametrize("average", Average)
def test_an_ensemble_decodes_like_any_step(average):
    step = jax.jit(
        functools.partial(
            generate, ensemble(*[_member] * 2, average=average), max_length=9, end_token=END, pad_token=PAD
        )
    )
    found = step(_states(TABLES[:2]), FIRST)
    for row, token in enumerate(FIRST):
        tokens, total = [], 0.0
        while len(tokens) < 9 and token != END:
            logits = _mean(int(token), average, TABLES[:2])
            token = np.argmax(logits)
            total += logits[token] - np.log(np.exp(logits).sum())
            tokens.append(int(token))
        np.testing.assert_array_equal(found.tokens[row], tokens + [PAD] * (9 - len(tokens)))
        np.testing.assert_allclose(found.log_probability[row], total, rtol=1e-5)


def test_an_ensemble_is_searched_by_beam():
    """Its states are branched and selected as one; one hypothesis is greedy."""
    members = [lambda tokens, state, table=table: (jnp.asarray(table)[tokens], state + 1) for table in TABLES]
    options = {"max_length": 9, "end_token": END, "pad_token": PAD}
    states = (jnp.zeros(len(FIRST)),) * MEMBERS
    beams = beam_search(ensemble(*members), states, jnp.asarray(FIRST), beam_size=1, **options)
    greedy = generate(ensemble(*members), states, jnp.asarray(FIRST), **options)
    np.testing.assert_array_equal(beams.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(beams.log_probability[:, 0], greedy.log_probability, rtol=1e-5)
    alone = beam_search(members[0], states[0], jnp.asarray(FIRST), beam_size=3, **options)
    copies = beam_search(ensemble(*members[:1] * 2), states[:2], jnp.asarray(FIRST), beam_size=3, **options)
    np.testing.assert_array_equal(copies.tokens, alone.tokens)
    np.testing.assert_allclose(copies.score, alone.score, rtol=1e-5)


def test_copies_of_one_model_are_that_model():
    run = functools.partial(generate, max_length=9, end_token=END, pad_token=PAD)
    alone = run(_member, _states()[0], jnp.asarray(FIRST))
    both = run(ensemble(_member, _member), _states([TABLES[0]] * 2), jnp.asarray(FIRST))
    np.testing.assert_array_equal(alone.tokens, both.tokens)
    np.testing.assert_allclose(alone.log_probability, both.log_probability, rtol=1e-5)


@pytest.mark.parametrize("average", Average)
@pytest.mark.parametrize("spoilt", [[np.nan], [np.inf], [-np.inf] * V], ids=str)
def test_b14_a_member_that_fails_is_not_averaged_away(average, spoilt):
    tables = [TABLES[0], TABLES[1].copy()]
    tables[1][2, : len(spoilt)] = spoilt
    step = ensemble(_member, _member, average=average)
    found = generate(step, _states(tables), jnp.asarray(FIRST), max_length=1, end_token=END, pad_token=PAD)
    np.testing.assert_array_equal(found.failed, FIRST == 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_means_are_computed_in_float32(dtype):
    low = [jnp.asarray(table).astype(dtype) for table in TABLES[:2]]
    logits, _ = ensemble(_member, _member)(jnp.asarray(FIRST), _states(low))
    exact = [_mean(token, Average.PROBABILITY, [np.asarray(x, np.float32) for x in low]) for token in FIRST]
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("as_users_call_it")
def test_what_is_no_ensemble_is_refused():
    with pytest.raises(ValueError, match="at least one step function"):
        ensemble()
    step = ensemble(_member, _member)
    with pytest.raises(ValueError, match=r"share one vocabulary, got logits \[\(5, 7\), \(5, 6\)\]"):
        jax.eval_shape(step, FIRST, _states([TABLES[0], TABLES[1][:, :6]]))
    for states in (_states(), _states()[0], _states()[:1]):
        with pytest.raises(ValueError, match="must be a tuple of 2 states, one for each member"):
            step(FIRST, states)
