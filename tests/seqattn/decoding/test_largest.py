"""The largest values against NumPy's stable sort."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seqattn.decoding.largest import BLOCK, largest

_LARGEST = jax.jit(largest, static_argnums=1)


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
    with pytest.raises(ValueError, match=rf"count \({count}\) must be from 1 to the number of values \(3\)"):
        largest(jnp.zeros(3), count)
