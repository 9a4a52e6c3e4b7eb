"""Dropout as a value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.dropout import Dropout, drop, kept, split

RATE, SHAPE = 0.3, (211, 307)


def test_elements_are_dropped_at_the_rate_and_the_mean_is_kept():
    dropped = np.asarray(jax.jit(lambda dropout, x: dropout(x))(Dropout(RATE, jax.random.key(0)), jnp.ones(SHAPE)))
    values = np.unique(dropped)
    np.testing.assert_allclose(values, [0, 1 / (1 - RATE)], rtol=1e-6)
    deviation = (RATE * (1 - RATE) / dropped.size) ** 0.5
    assert abs(np.mean(dropped == 0) - RATE) < 5 * deviation
    assert abs(dropped.mean() - 1) < 5 * deviation / (1 - RATE)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_a_small_dtype_keeps_rate_and_mean_too(dtype, rate):
    """0.9 is 0.8984 in bfloat16: what is divided by that is 0.17 % too large."""
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, SHAPE), dtype)
    dropped = np.asarray(jax.jit(Dropout(rate, jax.random.key(0)).__call__)(x), np.float64)
    kept = dropped != 0
    assert abs(1 - kept.mean() - rate) < 5 * (rate * (1 - rate) / kept.size) ** 0.5
    assert dropped.sum() / np.asarray(x, np.float64)[kept].sum() == pytest.approx(1 / (1 - rate), rel=1e-4)


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


def _threefry(words, row, column):
    """Threefry-2x32 with 20 rounds (Salmon 2011), one block, in Python integers."""

    def rotated(x, by):
        return (x << by | x >> (32 - by)) & 0xFFFFFFFF

    keys = [*words, words[0] ^ words[1] ^ 0x1BD11BDA]
    left, right = (row + keys[0]) & 0xFFFFFFFF, (column + keys[1]) & 0xFFFFFFFF
    for i in range(5):
        for by in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            left = (left + right) & 0xFFFFFFFF
            right = rotated(right, by) ^ left
        left = (left + keys[(i + 1) % 3]) & 0xFFFFFFFF
        right = (right + keys[(i + 2) % 3] + i + 1) & 0xFFFFFFFF
    return left ^ right


def _grid(rows, columns):
    return jnp.asarray(rows, jnp.uint32).reshape(-1, 1), jnp.asarray(columns, jnp.uint32).reshape(1, -1)


def test_what_is_kept_is_decided_by_one_threefry_block_an_element():
    words, rows, columns = jnp.array([0x9E3779B9, 7], jnp.uint32), [0, 1, 2**32 - 1], [0, 5, 2**31]
    for rate in (0.25, 0.7):
        expected = [[_threefry([0x9E3779B9, 7], r, c) >= rate * 2**32 for c in columns] for r in rows]
        np.testing.assert_array_equal(kept(words, rate, *_grid(rows, columns)), expected)


def test_what_is_kept_does_not_depend_on_the_tile():
    dropout = Dropout(RATE, jax.random.key(5))
    whole = np.asarray(jax.jit(dropout.keep)(*_grid(range(211), range(307))))
    tile = dropout.keep(*_grid(range(101, 111), range(13, 50)))
    np.testing.assert_array_equal(tile, whole[101:111, 13:50])
    deviation = (RATE * (1 - RATE) / whole.size) ** 0.5
    assert abs(np.mean(~whole) - RATE) < 5 * deviation
    for axis, size in ((0, 307), (1, 211)):  # no row and no column is kept more than others
        spread = np.std(whole.mean(axis=1 - axis))
        assert 0.8 < spread / (RATE * (1 - RATE) / size) ** 0.5 < 1.2
    other = np.asarray(Dropout(RATE, jax.random.key(6)).keep(*_grid(range(211), range(307))))
    assert abs(np.mean(whole & other) - (1 - RATE) ** 2) < 0.02


def test_the_words_of_a_key_of_any_kind():
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        np.testing.assert_array_equal(Dropout(RATE, key).words(), [0, 3])
    for kind in ("rbg", "unsafe_rbg"):
        words = [np.asarray(Dropout(RATE, jax.random.key(seed, impl=kind)).words()) for seed in (3, 4)]
        assert words[0].dtype == np.uint32
        assert words[0].shape == (2,)
        assert np.any(words[0] != words[1])


@pytest.mark.parametrize("rate", [0.0, 1 - 1e-12])
def test_rates_at_the_ends_keep_all_and_nearly_none(rate):
    keep = Dropout(rate, jax.random.key(0)).keep(*_grid(range(31), range(37)))
    np.testing.assert_array_equal(keep, np.full((31, 37), rate == 0))
