"""The largest values against NumPy's stable sort."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seqattn.top_k import BLOCK, Normaliser, top_k

_LARGEST = jax.jit(top_k, static_argnums=1)


def _expected(values, count):
    clean = np.where(np.isnan(values), -np.inf, values.astype(np.float32))
    places = np.argsort(-clean, axis=-1, kind="stable")[..., :count]
    return np.take_along_axis(clean, places, axis=-1), places


def _values(kind, shape):
    draw = np.random.default_rng(3)
    values = draw.normal(size=shape).astype(np.float32)
    if kind == "ties":
        values = draw.integers(0, 3, size=shape).astype(np.float32)
    if kind == "rare":  # the best block holds values that an earlier one has too
        values = np.floor(draw.exponential(size=shape)).astype(np.float32)
    if kind == "holes":
        values[draw.uniform(size=shape) < 0.99] = -np.inf
        values[0] = -np.inf
    if kind == "nan":
        values[draw.uniform(size=shape) < 0.3] = np.nan
        values[draw.uniform(size=shape) < 0.3] = -np.nan  # sorts below -inf, bit by bit
        values[1] = np.nan
    if kind == "zeros":
        values = np.where(draw.uniform(size=shape) < 0.5, np.float32(0), np.float32(-0.0))
    return values.astype(ml_dtypes.bfloat16) if kind == "bfloat16" else values


# Fewer than a block, one more than some, primes, and a multiple; with 3 the last two have enough blocks to choose from.
@pytest.mark.parametrize("size", [3, BLOCK - 1, 2 * BLOCK + 1, 997, 1024])
@pytest.mark.parametrize("kind", ["normal", "ties", "rare", "holes", "nan", "zeros", "bfloat16"])
def test_b15_as_a_stable_sort(size, kind):
    values = _values(kind, (23, size))
    for found, expected in zip(_LARGEST(jnp.asarray(values), 3), _expected(values, 3), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_all_of_them_and_any_leading_axes():
    values = _values("ties", (2, 1, 7, 1019))
    for found, expected in zip(_LARGEST(jnp.asarray(values), 5), _expected(values, 5), strict=True):
        np.testing.assert_array_equal(found, expected)
    few = values[0, 0, :, :11]
    for found, expected in zip(_LARGEST(jnp.asarray(few), 11), _expected(few, 11), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("count", [0, 4])
def test_the_count_is_from_one_to_all(count):
    with pytest.raises(ValueError, match=rf"count \({count}\) must be an integer from 1 to the number of values \(3\)"):
        top_k(jnp.zeros(3), count)


@pytest.mark.parametrize("size", [5, 1003])
def test_a_normaliser_keeps_the_digits_of_huge_logits(size):
    """The log-sum-exp itself would have rounded them away: float32 has 7 digits."""
    logits = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32) + np.float32([[0], [1e5], [-1e6]])
    wide = logits.astype(np.float64)
    expected = wide - wide.max(axis=1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    found = Normaliser.of(jnp.asarray(logits))
    np.testing.assert_allclose(found.log_probabilities(jnp.asarray(logits)), expected, rtol=1e-6)
    assert np.all(found.is_finite)


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_a_row_without_probabilities_is_not_finite(bad):
    logits = jnp.asarray([bad, [0.0, -np.inf]], jnp.float32)
    np.testing.assert_array_equal(Normaliser.of(logits).is_finite, [False, True])
