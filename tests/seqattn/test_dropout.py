"""Dropout as a value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.dropout import Dropout, drop, split

RATE, SHAPE = 0.3, (211, 307)


def test_elements_are_dropped_at_the_rate_and_the_mean_is_kept():
    dropped = np.asarray(jax.jit(lambda dropout, x: dropout(x))(Dropout(RATE, jax.random.key(0)), jnp.ones(SHAPE)))
    values = np.unique(dropped)
    np.testing.assert_allclose(values, [0, 1 / (1 - RATE)], rtol=1e-6)
    deviation = (RATE * (1 - RATE) / dropped.size) ** 0.5
    assert abs(np.mean(dropped == 0) - RATE) < 5 * deviation
    assert abs(dropped.mean() - 1) < 5 * deviation / (1 - RATE)


def test_what_is_dropped_depends_on_the_key_alone():
    x = jnp.linspace(1, 2, 1009)
    first, again = (np.asarray(Dropout(RATE, jax.random.key(1))(y)) == 0 for y in (x, -x))
    other = np.asarray(Dropout(RATE, jax.random.key(2))(x)) == 0
    np.testing.assert_array_equal(first, again)
    assert 0 < np.mean(first & other) < np.mean(first)


def test_gradients_flow_through_what_is_kept():
    dropout, x = Dropout(RATE, jax.random.key(0)), jnp.linspace(1, 2, 101)
    gradient = jax.jit(jax.grad(lambda x: dropout(x).sum()))(x)
    np.testing.assert_allclose(gradient, np.asarray(dropout(x)) / np.asarray(x), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_dtype_is_kept(dtype):
    assert Dropout(RATE, jax.random.key(0))(jnp.ones(7, dtype)).dtype == dtype


def test_a_dropped_nan_is_gone():
    dropped = np.asarray(Dropout(0.5, jax.random.key(0))(jnp.full(101, jnp.nan)))
    assert set(np.isnan(dropped)) == {True, False}
    assert np.all(dropped[~np.isnan(dropped)] == 0)


def test_rate_0_and_no_key_drop_nothing():
    x = jnp.arange(5.0)
    np.testing.assert_array_equal(Dropout(0.0, jax.random.key(0))(x), x)
    np.testing.assert_array_equal(drop(x, RATE, None), x)
    np.testing.assert_array_equal(drop(x, RATE, jax.random.key(3)), Dropout(RATE, jax.random.key(3))(x))


def test_split_keys_are_different():
    assert split(None, 3) == [None, None, None]
    keys = split(jax.random.key(0), 3)
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 3


def test_the_rate_is_static_and_the_key_a_leaf():
    keys = jax.random.split(jax.random.key(0))
    masks = jax.jit(jax.vmap(lambda dropout: dropout(jnp.ones(101))))(Dropout(RATE, keys))
    assert np.any(np.asarray(masks[0]) != np.asarray(masks[1]))


@pytest.mark.parametrize("rate", [1.5, -0.1, float("nan"), 1.0])
def test_a27_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match=rf"dropout rate \({rate}\) must be in \[0, 1\)"):
        Dropout(rate, jax.random.key(0))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        drop(jnp.ones(3), rate, jax.random.key(0))
