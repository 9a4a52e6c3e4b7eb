"""Penalties against their formulas, and the bound of exact stopping against every length."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.decoding.penalties import GNMT, AverageLength, CoveragePenalty, NoPenalty


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.6, 2.0])
def test_scores_are_those_of_the_papers(power):
    total, length = np.array([-1.5, -7.0, 0.0]), np.array([1, 11, 5])
    for penalty, divisor in [
        (NoPenalty(), 1.0),
        (AverageLength(power), length**power),
        (GNMT(power), ((5 + length) / 6) ** power),
    ]:
        found = penalty(jnp.asarray(total, jnp.float32), jnp.asarray(length))
        np.testing.assert_allclose(found, total / divisor, rtol=1e-5)


@hypothesis.given(
    total=st.floats(-50, 0, width=32),
    gain=st.floats(-5, 0, width=32),
    length=st.integers(1, 12),
    more=st.integers(1, 9),
)
@pytest.mark.parametrize(
    "penalty", [NoPenalty(), AverageLength(1.5), AverageLength(-0.7), GNMT(0.6), GNMT(-2.0)], ids=str
)
def test_b10_nothing_that_comes_of_a_sequence_exceeds_its_bound(penalty, total, gain, length, more):
    bound = penalty.bound(jnp.array([total]), jnp.array(length), max_length=21)
    later = penalty(jnp.array([total + gain]), jnp.array([length + more]))
    assert later[0] <= bound[0] + 1e-6 * abs(bound[0])


@pytest.mark.parametrize("penalty", [NoPenalty(), AverageLength(1.5), AverageLength(-0.7), GNMT(0.6)], ids=str)
def test_the_bound_is_reached(penalty):
    bound = penalty.bound(jnp.array([-3.0, -1.0]), jnp.array(4), max_length=9)
    scores = [penalty(jnp.array([-3.0, -1.0]), jnp.array([n])) for n in range(5, 10)]
    np.testing.assert_allclose(bound, np.max(scores, axis=0), rtol=1e-6)


@hypothesis.given(
    total=st.floats(-50, 9, width=32),
    limit=st.integers(1, 21),
    length=st.integers(1, 20),
    gain=st.floats(-2, 5, width=32),
)
@pytest.mark.parametrize("penalty", [NoPenalty(), AverageLength(1.5), AverageLength(-0.7), GNMT(-2.0)], ids=str)
def test_the_bound_of_tokens_that_raise_the_score_is_the_best_length_up_to_the_limit(
    penalty, total, limit, length, gain
):
    found = penalty.bound(
        jnp.array([total]), jnp.array(length), max_length=21, limit=jnp.array([limit]), gain=jnp.array([gain])
    )
    lengths = np.arange(length + 1, limit + 1)
    scores = penalty(jnp.asarray(total + gain * (lengths - length), jnp.float32), jnp.asarray(lengths))
    np.testing.assert_allclose(found[0], np.max(scores, initial=-np.inf), rtol=1e-5, atol=1e-5)


def test_coverage_is_that_of_gnmt_and_padding_does_not_count():
    coverage = np.array([[[0.5, 2.0, 0.0], [1.0, 0.25, 0.0]]], np.float32)
    found = CoveragePenalty(0.2, jnp.array([[True, True, False]]))(jnp.asarray(coverage))
    np.testing.assert_allclose(found, [[0.2 * np.log(0.5), 0.2 * np.log(0.25)]], rtol=1e-6)
    everywhere = CoveragePenalty(0.2, present=True)(jnp.asarray(coverage))
    assert np.all(np.isfinite(everywhere))
    assert np.all(everywhere < -10)
    np.testing.assert_array_equal(CoveragePenalty(0.2, np.ones((1, 3), bool))(jnp.asarray(coverage)), everywhere)


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize("present", [None, False])
def test_a_coverage_penalty_without_present_is_refused(present):
    with pytest.raises(ValueError, match="needs `present`, where the source has tokens: padding would count as unread"):
        CoveragePenalty(0.2, present)(jnp.ones((2, 3, 5)))


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(
    ("present", "error", "rule"),
    [
        (np.ones((2, 5)), TypeError, "present must be bool, got float"),
        (1, TypeError, "present must be bool, got int32"),
        (np.ones(5, bool), ValueError, r"present must be \[B, S\], \(2, 5\), as the alignment is, got \(5,\)"),
        (np.ones((1, 5), bool), ValueError, r"got \(1, 5\)"),
        (np.ones((2, 3), bool), ValueError, r"got \(2, 3\)"),
    ],
)
def test_a_present_that_does_not_fit_is_refused(present, error, rule):
    with pytest.raises(error, match=rule):
        CoveragePenalty(0.2, present)(jnp.ones((2, 3, 5)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AverageLength(np.nan), r"power \(nan\) must be finite"),
        (lambda: GNMT(np.inf), r"alpha \(inf\) must be finite"),
        (lambda: CoveragePenalty(-0.1), r"beta \(-0.1\) must be at least 0 and finite"),
    ],
)
def test_what_is_no_penalty_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
