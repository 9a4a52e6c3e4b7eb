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


def test_coverage_is_that_of_gnmt_and_padding_does_not_count():
    coverage = np.array([[[0.5, 2.0, 0.0], [1.0, 0.25, 0.0]]], np.float32)
    found = CoveragePenalty(0.2, jnp.array([[True, True, False]]))(jnp.asarray(coverage))
    np.testing.assert_allclose(found, [[0.2 * np.log(0.5), 0.2 * np.log(0.25)]], rtol=1e-6)
    everywhere = CoveragePenalty(0.2, present=True)(jnp.asarray(coverage))
    assert np.all(np.isfinite(everywhere))
    assert np.all(everywhere < -10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AverageLength(np.nan), r"power \(nan\) must be finite"),
        (lambda: GNMT(np.inf), r"alpha \(inf\) must be finite"),
        (lambda: CoveragePenalty(-0.1), r"beta \(-0.1\) must be finite and at least 0"),
    ],
)
def test_what_is_no_penalty_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
