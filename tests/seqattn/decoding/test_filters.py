"""Filters against sorted lists of tokens, and at their edges."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqattn.decoding import History, MinLogProbability, MinP, Temperature, TopK, TopP
from tests.logits_oracle import expected

B, BEAMS, V = 2, 3, 7
HISTORY = History(jnp.zeros((B, BEAMS, 1), jnp.int32), jnp.array(0), jnp.zeros((B, BEAMS), jnp.int32))
EDGES = [
    Temperature(0),
    Temperature(1e-45),
    TopK(1),
    TopK(V),
    TopK(V + 1),
    TopP(0),
    TopP(1),
    TopP(1.0),
    MinP(0),
    MinP(1),
    MinLogProbability(0),
]


@jax.jit
def _apply(processor, logits):
    return processor(logits, HISTORY)


def _one(processor, logits) -> np.ndarray:
    """Of one row, given as a list."""
    history = History(jnp.zeros((1, 1, 1), jnp.int32), jnp.array(0), jnp.zeros((1, 1), jnp.int32))
    return np.asarray(processor(jnp.asarray(logits)[None, None], history))[0, 0]


def _kept(processor, logits) -> list[int]:
    return np.flatnonzero(~np.isneginf(_one(processor, logits))).tolist()


# Integers, so that many are equal; the probabilities of the filters have a large prime below: no sum of theirs is one.
LOGITS = st.lists(st.sampled_from([-np.inf, -3.0, -1.0, -0.0, 0.0, 2.0, 2.5]), min_size=V, max_size=V).filter(
    lambda row: max(row) > -np.inf
)
PROBABILITY = st.integers(0, 1009).map(lambda i: i / 1009)
ONE_OR_EACH = lambda number: number | st.tuples(number, number).map(lambda pair: np.array(pair, np.float32))  # noqa: E731
FILTERS = {
    "Temperature": st.builds(Temperature, ONE_OR_EACH(st.sampled_from([0.0, 0.25, 0.7, 1.0, 3.0]))),
    "TopK": st.builds(TopK, st.integers(1, V + 1)),
    "TopP": st.builds(TopP, ONE_OR_EACH(PROBABILITY)),
    "MinLogProbability": st.builds(MinLogProbability, ONE_OR_EACH(PROBABILITY.map(lambda p: -7 * p - 1e-4))),
    "MinP": st.builds(MinP, ONE_OR_EACH(PROBABILITY)),
}


@pytest.mark.parametrize("name", FILTERS)
@given(data=st.data())
def test_it_keeps_what_a_sorted_list_keeps(name, data):
    processor = data.draw(FILTERS[name])
    logits = np.array(data.draw(st.tuples(*[LOGITS] * B * BEAMS)), np.float32).reshape(B, BEAMS, V)
    result = np.asarray(_apply(processor, logits))
    for row, beam in np.ndindex(B, BEAMS):
        oracle = expected(processor, logits[row, beam].astype(np.float64), [], row)
        np.testing.assert_allclose(result[row, beam], oracle, rtol=1e-6, err_msg=f"row {row}, beam {beam}")


@pytest.mark.parametrize("processor", EDGES, ids=str)
def test_b13_edges_keep_the_best_token_or_all(processor):
    keeps_all = processor in [TopK(V), TopK(V + 1), TopP(1), MinP(0)]
    logits = [-1.0, 3.0, 2.0, -90.0, 3.0, -np.inf, 0.0]
    one = [1, 4] if processor in [MinP(1)] else [1]  # which keeps what equals the best
    assert _kept(processor, logits) == ([0, 1, 2, 3, 4, 6] if keeps_all else one)
    if not isinstance(processor, Temperature):
        np.testing.assert_array_equal(_one(processor, logits)[one], 3)


def test_b13_top_p_1_keeps_all_where_rounded_sums_reach_1_early():
    logits = np.linspace(0, -60, 4001, dtype=np.float32)
    assert len(_kept(TopP(1), logits)) == 4001
    assert len(_kept(TopP(0.9999999), logits)) < 4001


@pytest.mark.parametrize(("wanted", "count"), [(0.0, 1), (0.25, 1), (0.2501, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_top_p_keeps_the_token_that_reaches_it(wanted, count):
    """Four equal tokens: their sums are exact, and of equal ones the lowest come first."""
    assert _kept(TopP(wanted), [1.0, -np.inf, 1.0, 1.0, 1.0]) == [0, 2, 3, 4][:count]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_b15_of_equal_logits_the_lowest_tokens_are_kept(count, dtype):
    logits = np.array([-0.0, -3, 0.0, -0.0, 0.0]).astype(dtype)
    assert _kept(TopK(count), logits) == [0, 2, 3, 4][:count]
    assert _kept(TopP(count / 4 - 0.1), logits) == [0, 2, 3, 4][:count]
    assert _kept(Temperature(0), logits) == [0]
    assert _one(TopK(count), logits).dtype == _one(TopP(0.5), logits).dtype == dtype


@pytest.mark.parametrize(("floor", "kept"), [(-1.0, [1]), (-1.1, [0, 1]), (-9.0, [0, 1, 3]), (-1e30, [0, 1, 3])])
def test_a_floor_of_log_probability_keeps_what_the_model_holds_for_probable(floor, kept):
    """The logits are log probabilities plus 5: it is the first that count."""
    logits = np.log(np.array([0.35, 0.6, 1e-38, 0.05], np.float32)) + 5
    logits[2] = -np.inf
    assert _kept(MinLogProbability(floor), logits) == kept
    assert _kept(MinLogProbability(floor), logits.astype(ml_dtypes.bfloat16)) == kept


def test_a_floor_that_no_token_reaches_keeps_the_lowest_of_the_best():
    assert _kept(MinLogProbability(-0.5), [0.0, 1.0, 1.0, -np.inf]) == [1]


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_min_p_keeps_what_equals_its_bound(ratio):
    assert _kept(MinP(ratio), np.log(np.array([1, ratio, ratio * 0.999, 1], np.float32))) == [0, 1, 3]


def test_no_temperature_overflows():
    """1e30 / 1e-30 would be inf, which fails a row."""
    result = _one(Temperature(1e-30), np.array([1e30, -1e30, 9e29], np.float32))
    np.testing.assert_array_equal(result, [0, -np.inf, -np.inf])


@pytest.mark.parametrize(
    "processor",
    [*EDGES, Temperature(0.5), Temperature(1e-30), TopK(2), TopP(0.6), MinP(0.4), MinLogProbability(-2.0)],
    ids=str,
)
def test_b14_no_filter_hides_what_says_nothing(processor):
    spoilt = np.zeros((B, BEAMS, V), np.float32)
    spoilt[0, 0, 3] = np.nan
    spoilt[0, 1] = -np.inf
    spoilt[0, 2, 6] = np.inf
    spoilt[1, 0] = [np.nan, np.inf, -np.inf, 0, 0, 0, 0]
    largest = np.asarray(_apply(processor, spoilt)).max(axis=-1)
    np.testing.assert_array_equal(np.isfinite(largest), [[False, False, False], [False, True, True]])


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(
    ("build", "value", "message"),
    [
        (Temperature, -0.5, "temperature (-0.5) must be at least 0 and finite"),
        (Temperature, np.array([1.0, np.inf]), "temperature (inf) must be at least 0 and finite"),
        (Temperature, float("nan"), "temperature (nan) must be at least 0 and finite"),
        (TopP, 1.5, "the probability of TopP (1.5) must be in [0, 1]"),
        (TopP, jnp.array(-0.1), "the probability of TopP (-0.1) must be"),
        (MinP, 2, "the probability of MinP (2) must be"),
        (MinLogProbability, 0.5, "the floor of MinLogProbability (0.5) must be at most 0 and finite"),
        (
            MinLogProbability,
            np.array([-1.0, -np.inf]),
            "the floor of MinLogProbability (-inf) must be at most 0 and finite",
        ),
        (TopK, 0, "count (0) must be an integer of at least 1"),
        (TopK, 2.5, "count (2.5) must be an integer of at least 1"),
    ],
)
def test_it_is_refused_when_it_is_built(build, value, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  # the message is compared
        build(value)
    assert message in str(refusal.value)


def test_vmap_over_values_is_a_loop_over_them():
    logits = np.random.default_rng(0).normal(size=(B, BEAMS, V)).astype(np.float32)
    values = jnp.array([0.0, 0.3, 0.9, 1.0])
    for kind in (Temperature, TopP, MinP):
        mapped = jax.vmap(_apply, in_axes=(0, None))(kind(values), logits)
        for value, result in zip(values, mapped, strict=True):
            np.testing.assert_allclose(result, _apply(kind(value), logits), rtol=1e-6)
