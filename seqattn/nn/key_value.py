"""Keys and values with the coordinates of their tokens: training, cache and encoder memory are the same type."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from seqattn.coordinates import Coordinates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValue:
    """What queries attend to.

    Attributes:
        key: `[*batch, S, K, H]`.
        value: `[*batch, S, K, V]`.
        at: coordinates `[*batch, S]`. A slot of a cache that was never written is padding (segment 0).
    """

    key: Array
    value: Array
    at: Coordinates

    @staticmethod
    def empty(
        batch: tuple[int, ...],
        length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> "KeyValue":
        """A cache of `length` slots, all padding; `value_dim` is `head_dim` where not given."""
        slots = jnp.zeros((*batch, length), jnp.int32)
        key = jnp.zeros((*batch, length, num_kv_heads, head_dim), dtype)
        value = jnp.zeros((*batch, length, num_kv_heads, head_dim if value_dim is None else value_dim), dtype)
        return KeyValue(key, value, Coordinates(slots, slots))

    def write(self, new: "KeyValue", slot: Int[Array, "*batch"] | int) -> "KeyValue":
        """This cache with `new` `[*batch, T, ...]` written from `slot` on (one number, or one for each row).

        Raises:
            TypeError: a slot is not an integer.
            ValueError: shapes differ but for the length, or the new tokens do not fit behind `slot`. Inside `jit`,
                where the latter cannot be raised, keys and values that do not fit are written as NaN over the last
                slots: the loss of data shows in the output.

        >>> cache = KeyValue.empty((1,), 4, num_kv_heads=1, head_dim=2)
        >>> token = KeyValue(jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2)), Coordinates.range(1))
        >>> token = dataclasses.replace(token, at=jax.tree.map(lambda x: x[None], token.at))
        >>> print(cache.write(token, 2).at.segment)
        [[0 0 1 0]]
        """
        batch, length, count = self.at.shape[:-1], self.at.shape[-1], new.at.shape[-1]
        _check_shapes(self, new)
        if count > length:
            raise ValueError(f"{count} tokens do not fit into a cache of {length}")
        if not jnp.issubdtype(jnp.result_type(slot), jnp.integer):
            raise TypeError(f"a slot must be an integer, got {jnp.result_type(slot)}")
        if not isinstance(slot, jax.core.Tracer):
            _check_fits(np.asarray(slot), count, length)
        slot = jnp.broadcast_to(jnp.asarray(slot, jnp.int32), batch)
        fits = (slot >= 0) & (slot <= length - count)
        poisoned = dataclasses.replace(new, key=_poison(new.key, fits), value=_poison(new.value, fits))

        def row(old: Array, fresh: Array, start: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, fresh.astype(old.dtype), start, axis=0)

        for _ in batch:
            row = jax.vmap(row)
        return jax.tree.map(lambda old, fresh: row(old, fresh, slot), self, poisoned)


def _check_shapes(cache: KeyValue, new: KeyValue) -> None:
    """All but the length must agree: a smaller head would leave the rest of its slot as it was."""
    names, axis = ("key", "value", "at"), cache.at.position.ndim - 1
    pairs = [(name, getattr(cache, name).shape, getattr(new, name).shape) for name in names]
    for name, old, fresh in pairs:
        if len(old) != len(fresh) or old[:axis] != fresh[:axis] or old[axis + 1 :] != fresh[axis + 1 :]:
            raise ValueError(f"{name} {fresh} does not fit the cache's {old}: all dims but the length must agree")


def _check_fits(slot: np.ndarray, count: int, length: int) -> None:
    # In NumPy, since inside `jit` even the minimum of an array from outside would be traced.
    outside = slot[(slot < 0) | (slot > length - count)]
    if outside.size:
        raise ValueError(f"{count} tokens do not fit at slot {outside[0]} into a cache of {length}")


def _poison(x: Array, fits: Array) -> Array:
    return jnp.where(fits.reshape(*fits.shape, 1, 1, 1), x, jnp.full_like(x, jnp.nan))
