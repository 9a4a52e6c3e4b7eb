"""Keys and values as columns: the same tokens, what is written stays, and what does not fit is not lost in silence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.nn import KeyColumns, KeyValue
from seqattn.nn.key_value import Written

B, SIZE, K, H, V = 3, 7, 2, 3, 5


def random_tokens(count: int, seed: int = 0, batch: int = B, num_heads: int = K) -> KeyValue:
    random = np.random.default_rng(seed)
    key, value = (jnp.asarray(random.normal(size=(batch, count, num_heads, dim)), jnp.float32) for dim in (H, V))
    position, segment = (jnp.asarray(random.integers(1, 9, (batch, count)), jnp.int32) for _ in range(2))
    return KeyValue(key, value, Coordinates(position, segment))


def _empty(dtype=jnp.float32) -> KeyColumns:
    return KeyColumns.empty(B, SIZE, K, H, value_dim=V, dtype=dtype)


def _same(actual: KeyValue, expected: KeyValue) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


_write = jax.jit(lambda columns, new, slot: columns.write(KeyColumns.of(new), slot))


def test_columns_are_the_same_tokens():
    tokens = random_tokens(SIZE)
    _same(KeyColumns.of(tokens).rows(), tokens)


def test_what_is_not_finite_is_marked_and_comes_back_as_nan():
    tokens = random_tokens(SIZE)
    bad = dataclasses.replace(
        tokens, key=tokens.key.at[0, 2, 1, 0].set(jnp.inf), value=tokens.value.at[1, 4].set(jnp.nan)
    )
    columns = KeyColumns.of(bad)
    np.testing.assert_array_equal(np.argwhere(~np.asarray(columns.finite)), [[0, 2], [1, 4]])
    assert np.all(np.isfinite(columns.key))
    assert np.all(np.isfinite(columns.value))
    rows = columns.rows()
    assert np.all(np.isnan(rows.key[0, 2]))
    assert np.all(np.isnan(rows.value[1, 4]))
    assert np.isnan(rows.key).sum() == 2 * K * H


def test_coordinates_of_one_row_serve_all():
    tokens = dataclasses.replace(random_tokens(SIZE), at=Coordinates.range(SIZE))
    assert KeyColumns.of(tokens).at.shape == (B, SIZE)


def test_another_number_of_batch_dims_is_refused():
    with pytest.raises(ValueError, match=r"columns have one batch dim: key must be \[B, S, K, H\], got \(7, 2, 3\)"):
        KeyColumns.of(jax.tree.map(lambda x: x[0], random_tokens(SIZE)))


@pytest.mark.parametrize("jitted", [False, True])
def test_what_was_written_before_stays(jitted):
    first, second = random_tokens(2, 0), random_tokens(3, 1)
    columns = _empty()
    for new, slot in ((first, 1), (second, 3)):
        columns = _write(columns, new, slot) if jitted else columns.write(KeyColumns.of(new), slot)
    rows = columns.rows()
    expected = jax.tree.map(
        lambda a, b: jnp.concatenate([jnp.zeros_like(a[:, :1]), a, b, jnp.zeros_like(a[:, :1])], axis=1), first, second
    )
    written = Written().dense(rows.at, rows.at)[:, 0]
    np.testing.assert_array_equal(written, [[False, True, True, True, True, True, False]] * B)
    position = jnp.where(written, rows.at.position, 0)
    _same(dataclasses.replace(rows, at=Coordinates(position, rows.at.segment)), expected)


def test_a_cache_keeps_its_dtype():
    columns = _empty(jnp.bfloat16).write(KeyColumns.of(random_tokens(2)), 0)
    assert (columns.key.dtype, columns.value.dtype, columns.at.position.dtype) == (
        jnp.bfloat16,
        jnp.bfloat16,
        jnp.int32,
    )


@pytest.mark.parametrize("slot", [-1, SIZE - 1, SIZE])
def test_a14_tokens_that_do_not_fit_are_an_error_and_inside_jit_not_finite(slot):
    new = random_tokens(2)
    with pytest.raises(ValueError, match=f"2 tokens do not fit at slot {slot} into a cache of {SIZE}"):
        _empty().write(KeyColumns.of(new), slot)
    written = _write(_empty(), new, slot)
    assert (~np.asarray(written.finite)).sum() == 2 * B


def test_more_tokens_than_slots_are_an_error_even_inside_jit():
    with pytest.raises(ValueError, match="9 tokens do not fit into a cache of 7"):
        _write(_empty(), random_tokens(9), 0)


@pytest.mark.parametrize("other", [random_tokens(2, batch=2), random_tokens(2, num_heads=1)])
def test_other_shapes_are_refused(other):
    with pytest.raises(ValueError, match="does not fit the cache's"):
        _empty().write(KeyColumns.of(other), 0)


def test_then_puts_new_tokens_behind():
    first, second = random_tokens(2, 0), random_tokens(3, 1)
    both = KeyColumns.of(first).then(KeyColumns.of(second)).rows()
    _same(both, jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second))
