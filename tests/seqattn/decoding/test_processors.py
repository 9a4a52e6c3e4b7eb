"""Constraints against loops over single rows, and what must not be built."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqattn.decoding import (
    Banned,
    ForcedPrefix,
    History,
    LogitsProcessor,
    Lowering,
    MinLength,
    MinLogProbability,
    MinP,
    NoRepeatNgram,
    PrefixCost,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
)
from seqattn.decoding.processors import process
from tests.logits_oracle import expected

B, BEAMS, L, V, P = 2, 3, 5, 7, 4
PREFIX = np.array([[3, 1, 6, 0], [5, 5, 99, -1]])  # what is behind a length means nothing
EVERY = {
    "penalty": RepetitionPenalty(1.3),
    "penalties": RepetitionPenalty(np.array([0.7, 2.0], np.float32)),
    "1-gram": NoRepeatNgram(1),
    "2-gram": NoRepeatNgram(2),
    "3-gram": NoRepeatNgram(3),
    "n-gram of all": NoRepeatNgram(L + 1),
    "n-gram of more": NoRepeatNgram(L + 2),
    "minimum": MinLength(3, end_token=6),
    "minima": MinLength(np.array([0, 5]), end_token=0),
    "prefix": ForcedPrefix(PREFIX, np.array([4, 2])),
    "short prefix": ForcedPrefix(PREFIX, np.array([0, 1])),
    "free prefix": ForcedPrefix(PREFIX, np.array([4, 2]), PrefixCost.NOTHING),
    "banned": Banned((0, 4)),
    "nothing banned": Banned(()),
}


@jax.jit
def _apply(processor, logits, history):
    return processor(logits, history)


def _history(seed: int, length: int, alphabet: int = 3) -> History:
    """Few different tokens, so that they repeat; behind `length` are tokens too, which were never said."""
    rng = np.random.default_rng(seed)
    tokens, first = rng.integers(0, alphabet, (B, BEAMS, L)), rng.integers(0, alphabet, (B, BEAMS))
    return History(jnp.asarray(tokens, jnp.int32), jnp.asarray(length, jnp.int32), jnp.asarray(first, jnp.int32))


def _logits(seed: int) -> np.ndarray:
    logits = 3 * np.random.default_rng(seed).normal(size=(B, BEAMS, V)).astype(np.float32)
    logits[0, 1, 2] = -np.inf
    return logits


def _said(history: History, row: int, beam: int) -> list[int]:
    return [int(history.first[row, beam]), *np.asarray(history.tokens[row, beam, : history.length]).tolist()]


@pytest.mark.parametrize("processor", EVERY.values(), ids=EVERY)
@given(seed=st.integers(0, 99), length=st.integers(0, L - 1), alphabet=st.sampled_from([2, 4]))
def test_it_is_a_loop_over_single_rows(processor, seed, length, alphabet):
    history, logits = _history(seed, length, alphabet), _logits(seed)
    result = np.asarray(_apply(processor, logits, history))
    for row, beam in np.ndindex(B, BEAMS):
        oracle = expected(processor, logits[row, beam].astype(np.float64), _said(history, row, beam), row)
        np.testing.assert_allclose(result[row, beam], oracle, rtol=1e-6, err_msg=f"row {row}, beam {beam}")


@pytest.mark.parametrize("name", [*EVERY, "filters"])
@pytest.mark.parametrize("highest", [-3.0, 0.0, 2.5])
def test_no_result_exceeds_what_a_processor_says_of_itself(name, highest):
    filters = [Temperature(0.4), Temperature(3.0), Temperature(0), TopK(2), TopP(0.5), MinP(0.5), MinLogProbability(-2)]
    for processor in filters if name == "filters" else [EVERY[name]]:
        for seed in range(3):
            logits = _logits(seed)
            logits += highest - logits.max(axis=(1, 2), keepdims=True)
            bound = np.asarray(processor.bound(jnp.full(B, highest)))
            assert bound.shape == (B,)
            result = np.asarray(_apply(processor, logits, _history(seed, 3, 4)))
            assert np.all(result <= bound[:, None, None] + 1e-6)


def test_only_a_processor_that_says_so_has_a_bound():
    assert np.all(np.isposinf(_Wrong(lambda logits: logits).bound(jnp.zeros(B))))
    assert {type(each) for each in EVERY.values() if isinstance(each, Lowering)} == {Banned, MinLength, NoRepeatNgram}


def test_the_first_token_that_was_fed_counts_as_said():
    history = History(jnp.array([[[4, 2, 0]]]), jnp.array(2), jnp.array([[5]]))
    zeros = jnp.zeros((1, 1, V))
    assert np.flatnonzero(np.isneginf(NoRepeatNgram(1)(zeros, history))).tolist() == [2, 4, 5]
    assert np.flatnonzero(RepetitionPenalty(2.0)(zeros - 1, history) == -2).tolist() == [2, 4, 5]
    back = History(jnp.array([[[4, 5, 0]]]), jnp.array(2), jnp.array([[5]]))
    assert np.flatnonzero(np.isneginf(NoRepeatNgram(2)(zeros, back))).tolist() == [4]


@pytest.mark.parametrize("processor", EVERY.values(), ids=EVERY)
def test_nan_stays_and_the_dtype_stays(processor):
    logits = np.full((B, BEAMS, V), np.nan, ml_dtypes.bfloat16)
    result = _apply(processor, logits, _history(0, 3))
    assert np.all(np.isnan(result))
    assert result.dtype == jnp.bfloat16


def test_what_lies_outside_the_vocabulary_was_not_said():
    history = History(jnp.array([[[-1, V, -V]]]), jnp.array(2), jnp.array([[-2]]))
    logits = jnp.ones((1, 1, V))
    for processor in (RepetitionPenalty(2.0), NoRepeatNgram(1)):
        np.testing.assert_array_equal(processor(logits, history), logits)


def test_lengths_are_compared_as_integers_whatever_the_logits_are():
    history = History(jnp.zeros((1, 1, 300), jnp.int32), jnp.array(257), jnp.zeros((1, 1), jnp.int32))
    logits = jnp.zeros((1, 1, V), jnp.bfloat16)
    assert np.isneginf(MinLength(259, end_token=2)(logits, history)[0, 0, 2])
    assert MinLength(258, end_token=2)(logits, history)[0, 0, 2] == 0


def test_a_prefix_of_nothing_forces_nothing():
    empty = ForcedPrefix(np.zeros((B, 0), np.int32), np.zeros(B, np.int32))
    np.testing.assert_array_equal(_apply(empty, _logits(0), _history(0, 1)), _logits(0))


def test_a_forced_token_outside_the_vocabulary_leaves_nothing():
    forced = ForcedPrefix(np.full((B, 1), V), np.array([1, 0]))
    np.testing.assert_array_equal(
        np.isneginf(_apply(forced, np.zeros((B, BEAMS, V)), _history(0, 0))).all((1, 2)), [1, 0]
    )


def test_vmap_over_values_is_a_loop_over_them():
    logits, history, penalties = _logits(1), _history(1, 4), jnp.array([0.5, 1.0, 3.0])
    mapped = jax.vmap(_apply, in_axes=(0, None, None))(RepetitionPenalty(penalties), logits, history)
    for penalty, result in zip(penalties, mapped, strict=True):
        np.testing.assert_allclose(result, _apply(RepetitionPenalty(penalty), logits, history), rtol=1e-6)


def test_processors_are_applied_in_order():
    """A penalty behind a temperature is another one than before it."""
    logits, history = jnp.array([[[1.0, 2.0]]]), History(jnp.array([[[0]]]), jnp.array(0), jnp.array([[1]]))
    first = process((RepetitionPenalty(2.0), Temperature(0.5)), logits, history)
    second = process((Temperature(0.5), RepetitionPenalty(2.0)), logits, history)
    np.testing.assert_array_equal(first, [[[0, 0]]])
    np.testing.assert_array_equal(second, [[[-2, 0]]])


class _Wrong(LogitsProcessor):
    def __init__(self, change):
        self.change = change

    def __call__(self, logits, history):
        return self.change(logits)


@pytest.mark.parametrize("change", [lambda x: x[..., :-1], lambda x: x.astype(jnp.float16)], ids=["shape", "dtype"])
def test_a_processor_returns_what_it_was_given(change):
    rule = r"_Wrong must return logits \(2, 3, 7\) of float32, as it was given, got \(2, 3, [67]\) of float"
    with pytest.raises(ValueError, match=rule):
        process((_Wrong(change),), jnp.asarray(_logits(0)), _history(0, 1))


REFUSED = {
    "penalty (0) must be positive and finite": lambda: RepetitionPenalty(0),
    "penalty (-2) must be positive and finite": lambda: RepetitionPenalty(np.array([1.0, -2.0])),
    "penalty (nan) must be positive and finite": lambda: RepetitionPenalty(jnp.array(jnp.nan)),
    "penalty (inf) must be positive and finite": lambda: RepetitionPenalty(float("inf")),
    "size (0) must be an integer of at least 1": lambda: NoRepeatNgram(0),
    "size (2.0) must be an integer": lambda: NoRepeatNgram(2.0),
    "length (-1) must be in [0, 2.14748e+09]": lambda: MinLength(-1, end_token=1),
    "end_token (-1) must be an integer of at least 0": lambda: MinLength(1, end_token=-1),
    "forced prefix (5) must be in [0, 4]": lambda: ForcedPrefix(PREFIX, np.array([5, 0])),
    "forced prefix (-1) must be in [0, 4]": lambda: ForcedPrefix(PREFIX, np.array([-1, 0])),
    "a banned token (-1) must be an integer of at least 0": lambda: Banned((3, -1)),
    "a banned token (True) must be an integer": lambda: Banned((True,)),
}


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize("message", REFUSED)
def test_it_is_refused_when_it_is_built(message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  # the message is compared
        REFUSED[message]()
    assert message in str(refusal.value)


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MinLength(1, end_token=V), r"end_token \(7\) must be below the size of the vocabulary \(7\)"),
        (lambda: Banned((1, V)), r"a banned token \(7\) must be below the size of the vocabulary \(7\)"),
        (lambda: RepetitionPenalty(np.ones(B + 1)), r"one number or one for each of 2 rows, got the shape \(3,\)"),
        (lambda: ForcedPrefix(PREFIX[:1], np.array([1])), r"for B 2 rows, got \(1, 4\) and \(1,\)"),
        (lambda: ForcedPrefix(PREFIX, np.array([1])), r"for B 2 rows, got \(2, 4\) and \(1,\)"),
        (lambda: ForcedPrefix(PREFIX[0], np.array(1)), r"for B 2 rows, got \(4,\) and \(\)"),
    ],
    ids=["end", "ban", "penalties", "prefixes", "lengths", "rank"],
)
def test_it_is_refused_where_it_does_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(_apply, build(), _logits(0), _history(0, 1))


def test_traced_values_pass_and_new_values_compile_nothing_anew():
    traced = []

    @jax.jit
    def apply(processor, logits, history):
        traced.append(1)
        return processor(logits, history)

    for value in (0.5, 1.0, 2.0):
        apply(RepetitionPenalty(value), _logits(0), _history(0, 1))
        apply(TopP(value / 2), _logits(0), _history(0, 1))
    assert len(traced) == 2
    jax.jit(lambda p: RepetitionPenalty(p)(jnp.asarray(_logits(0)), _history(0, 1)))(-1.0)


@pytest.mark.parametrize("processor", EVERY.values(), ids=EVERY)
def test_it_is_a_pytree_whose_leaves_may_be_anything(processor):
    """Transformations fill them with axes and placeholders."""
    leaves, tree = jax.tree.flatten(processor)
    again = jax.tree.unflatten(tree, leaves)
    assert jax.tree.structure(again) == tree
    assert all(x is y for x, y in zip(jax.tree.leaves(again), leaves, strict=True))


@pytest.mark.usefixtures("as_users_call_it")
def test_a_cost_of_a_prefix_is_a_choice():
    with pytest.raises(TypeError, match="cost must be a PrefixCost, got 0"):
        ForcedPrefix(PREFIX, np.array([1, 1]), 0)


def test_history_with_the_first_token():
    history = History(jnp.array([[[4, 2, 0]]]), jnp.array(2), jnp.array([[5]]))
    np.testing.assert_array_equal(history.fed(), [[[5, 4, 2, 0]]])
