"""A cache of keys and values: what is written stays where it is, and what does not fit is not lost in silence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.nn import KeyValue

LENGTH, K, H, V = 7, 2, 3, 5


def _random(batch: tuple[int, ...], count: int, seed: int = 0) -> KeyValue:
    random = np.random.default_rng(seed)
    key, value = (jnp.asarray(random.normal(size=(*batch, count, K, dim)), jnp.float32) for dim in (H, V))
    position, segment = (jnp.asarray(random.integers(1, 9, (*batch, count)), jnp.int32) for _ in range(2))
    return KeyValue(key, value, Coordinates(position, segment))


def _empty(batch: tuple[int, ...]) -> KeyValue:
    return KeyValue.empty(batch, LENGTH, K, H, value_dim=V)


def _expected(batch: tuple[int, ...], new: KeyValue, slots: np.ndarray) -> list[np.ndarray]:
    """The leaves of the same in NumPy: row by row into zeros."""

    def write(fresh: jax.Array) -> np.ndarray:
        written = np.zeros((*batch, LENGTH, *fresh.shape[len(batch) + 1 :]), fresh.dtype)
        for row in np.ndindex(*batch):
            written[row][slots[row] : slots[row] + fresh.shape[len(batch)]] = fresh[row]
        return written

    return [write(leaf) for leaf in jax.tree.leaves(new)]


def _equal(actual: KeyValue, expected: list[np.ndarray]) -> None:
    for leaf, wanted in zip(jax.tree.leaves(actual), expected, strict=True):
        np.testing.assert_array_equal(leaf, wanted, strict=True)


_write = jax.jit(KeyValue.write)


@pytest.mark.parametrize(("batch", "count"), [((), 2), ((3,), 1), ((3,), LENGTH), ((3, 2), 2)], ids=str)
def test_one_slot_for_all_rows_or_one_for_each(batch, count):
    new, last = _random(batch, count), LENGTH - count
    for slots in (np.full(batch, last // 2), np.random.default_rng(1).integers(0, last + 1, batch)):
        slots = slots.astype(np.int32)
        expected = _expected(batch, new, slots)
        _equal(_write(_empty(batch), new, jnp.asarray(slots)), expected)
        _equal(_empty(batch).write(new, jnp.asarray(slots)), expected)
    _equal(_empty(batch).write(new, last // 2), _expected(batch, new, np.full(batch, last // 2)))


def test_what_was_written_before_stays():
    first, second = _random((3,), 2, seed=0), _random((3,), 3, seed=1)
    both = _write(_write(_empty((3,)), first, jnp.array([0, 1, 5])), second, jnp.array([2, 3, 1]))
    expected = _expected((3,), first, np.array([0, 1, 5]))
    for old, new in zip(expected, jax.tree.leaves(second), strict=True):
        for row, slot in enumerate([2, 3, 1]):
            old[row, slot : slot + 3] = new[row]
    _equal(both, expected)


def test_an_empty_cache_is_padding():
    cache = KeyValue.empty((2,), 5, 3, 7)
    assert (cache.key.shape, cache.value.shape, cache.at.shape) == ((2, 5, 3, 7), (2, 5, 3, 7), (2, 5))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(cache))


def test_a_cache_keeps_its_dtype():
    cache = KeyValue.empty((3,), LENGTH, K, H, value_dim=V, dtype=jnp.bfloat16).write(_random((3,), 2), 1)
    assert cache.key.dtype == cache.value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(cache.value[:, 1:3], _random((3,), 2).value.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        (LENGTH - 1, "2 tokens do not fit at slot 6 into a cache of 7"),
        (-1, "2 tokens do not fit at slot -1 into a cache of 7"),
        (jnp.array([0, 9, 1]), "2 tokens do not fit at slot 9 into a cache of 7"),
        (jnp.array([5, -3, 1]), "2 tokens do not fit at slot -3 into a cache of 7"),
    ],
    ids=str,
)
def test_a14_tokens_beyond_the_cache_are_an_error(slot, message):
    with pytest.raises(ValueError, match=message):
        _empty((3,)).write(_random((3,), 2), slot)
    # A slot known at trace time, also an array from outside the jitted function, raises there, too.
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda cache: cache.write(_random((3,), 2), slot))(_empty((3,)))


def test_a14_more_tokens_than_the_cache_holds_are_an_error_also_inside_jit():
    with pytest.raises(ValueError, match="8 tokens do not fit into a cache of 7"):
        _write(_empty((3,)), _random((3,), 8), jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize("slot", [LENGTH - 1, LENGTH, 99, -1, -99, 2**31 - 1, -(2**31)])
def test_a14_inside_jit_tokens_beyond_the_cache_become_nan(slot):
    full, new = _random((3,), LENGTH, seed=1), _random((3,), 2)
    cache = _write(full, new, jnp.array([1, slot, 3]))
    for old, fresh, written in ((full.key, new.key, cache.key), (full.value, new.value, cache.value)):
        for row, start in ((0, 1), (2, 3)):
            expected = np.array(old[row])
            expected[start : start + 2] = fresh[row]
            np.testing.assert_array_equal(written[row], expected)
        assert np.isnan(written[1]).all(axis=(1, 2)).sum() == 2


@pytest.mark.parametrize("field", ["key", "value", "at"])
def test_tokens_of_another_shape_are_refused(field):
    """A smaller head would leave the rest of its slot as it was."""
    new = _random((3,), 2)
    smaller = jax.tree.map(lambda x: x[:2] if field == "at" else x[..., :2], getattr(new, field))
    with pytest.raises(ValueError, match=f"{field} .* does not fit the cache's"):
        _empty((3,)).write(dataclasses.replace(new, **{field: smaller}), 1)


@pytest.mark.usefixtures("as_users_call_it")
def test_a_slot_is_an_integer():
    with pytest.raises(TypeError, match="a slot must be an integer, got float32"):
        _empty((3,)).write(_random((3,), 2), jnp.ones(3))


def test_slots_from_outside_a_jitted_function():
    slots, new = jnp.array([0, 3, 1]), _random((3,), 2)
    written = jax.jit(lambda cache: cache.write(new, slots))(_empty((3,)))
    _equal(written, _expected((3,), new, np.asarray(slots)))


def test_a_batch_of_nothing():
    assert _write(_empty((0,)), _random((0,), 2), jnp.zeros(0, jnp.int32)).key.shape == (0, LENGTH, K, H)
    assert _empty((0,)).write(_random((0,), 2), jnp.zeros(0, jnp.int32)).key.shape == (0, LENGTH, K, H)


def test_writing_in_a_scan_is_writing_at_once():
    new = _random((3,), 5)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], new)

    def advance(cache, token):
        index, fresh = token
        return cache.write(fresh, jnp.array([0, 1, 2]) + index), None

    stepped, _ = jax.lax.scan(advance, _empty((3,)), (jnp.arange(5), tokens))
    _equal(stepped, _expected((3,), new, np.arange(3)))


def test_gradients_reach_what_was_written_and_what_was_kept():
    def total(old, new, slot):
        return (_weights * jnp.zeros((3, LENGTH, K, V)).at[:].set(_cache(old).write(_cache(new), slot).value)).sum()

    def _cache(value):
        at = jnp.ones(value.shape[:2], jnp.int32)
        return KeyValue(value[..., :H], value, Coordinates(at, at))

    _weights = jnp.arange(3.0 * LENGTH * K * V).reshape(3, LENGTH, K, V)
    old, new = (_random((3,), count).value for count in (LENGTH, 2))
    by_old, by_new = jax.jit(jax.grad(total, argnums=(0, 1)))(old, new, jnp.array([0, 5, 2]))
    for row, slot in enumerate([0, 5, 2]):
        np.testing.assert_array_equal(by_new[row], _weights[row, slot : slot + 2])
        kept = np.array(_weights[row])
        kept[slot : slot + 2] = 0
        np.testing.assert_array_equal(by_old[row], kept)
