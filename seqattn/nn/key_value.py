"""Keys and values with the coordinates of their tokens: training and encoder memory; and as columns, for steps."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from seqattn.coordinates import Coordinates, Tile
from seqattn.kernels.cached import rows_of
from seqattn.kernels.call import Columns
from seqattn.mask import Mask, Reach, Truth
from seqattn.pytrees import pytree, static
from seqattn.sizes import known_size, may_exceed


@pytree
@dataclasses.dataclass(frozen=True)
class KeyValue:
    """What queries attend to.

    Attributes:
        key: `[*batch, S, K, H]`.
        value: `[*batch, S, K, V]`.
        at: coordinates `[*batch, S]`; padding has segment 0.
        of_cache: whether these are slots of a cache, some of which were maybe never written.
    """

    key: Array
    value: Array
    at: Coordinates
    of_cache: bool = static(default=False)


_NEVER = -(2**30)
"""The position of a slot of a cache that was never written; half of the range, as masks take differences."""


@pytree
@dataclasses.dataclass(frozen=True)
class Written(Mask):
    """The slots of a cache that were written."""

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return key.position != _NEVER

    def reach(self, query: Tile, key: Tile) -> Reach:
        return Reach(some=key.position_max != _NEVER, every=key.position_min != _NEVER)


@pytree
@dataclasses.dataclass(frozen=True)
class KeyColumns:
    """What the queries of a step attend to, laid out so that a step neither copies nor checks what it reads.

    Attributes:
        key: `[B, K, H, S]`, a column for each token.
        value: `[B, K, S, V]`.
        at: coordinates `[B, S]`. A slot of a cache that was never written is padding (segment 0), at a position that
            no token has, by which `Written` tells it from padding that was written.
        finite: `[B, S]`, False where key or value were not finite, which then are 0 here.
        visible: `[B, T, S]`, whose keys are whose where that is not a matter of coordinates: queries that stand for
            hypotheses of one text see their own keys in a pool. None where each query may see every key.
    """

    key: Array
    value: Array
    at: Coordinates
    finite: Bool[Array, "B S"]
    visible: Bool[Array, "B T S"] | None = None

    @staticmethod
    def of(kv: KeyValue, dtype: DTypeLike | None = None) -> "KeyColumns":
        """Keys and values `[B, S, K, H]` as columns, of `dtype` or of their own.

        Raises:
            ValueError: there is not one batch dim.
        """
        if kv.key.ndim != 4:
            raise ValueError(f"columns have one batch dim: key must be [B, S, K, H], got {kv.key.shape}")
        # Cast before: what is finite may be too large for fewer bits.
        given = [x if dtype is None else x.astype(dtype) for x in (kv.key, kv.value)]
        finite = jnp.isfinite(given[0]).all(axis=(-2, -1)) & jnp.isfinite(given[1]).all(axis=(-2, -1))
        key, value = (jnp.where(finite[..., None, None], x, jnp.zeros_like(x)) for x in given)
        at = jax.tree.map(lambda field: jnp.broadcast_to(field, finite.shape), kv.at)
        return KeyColumns(key.transpose(0, 2, 3, 1), value.swapaxes(1, 2), at, finite)

    @staticmethod
    def empty(
        batch: int, size: int, num_kv_heads: int, head_dim: int, *, value_dim: int, dtype: DTypeLike
    ) -> "KeyColumns":
        """`size` slots, all padding.

        Raises:
            ValueError: `size` is negative.
        """
        if size < 0:
            raise ValueError(f"a cache must have at least 0 slots, got {size}")
        slots = Coordinates(jnp.full((batch, size), _NEVER, jnp.int32), jnp.zeros((batch, size), jnp.int32))
        key = jnp.zeros((batch, num_kv_heads, head_dim, size), dtype)
        value = jnp.zeros((batch, num_kv_heads, size, value_dim), dtype)
        return KeyColumns(key, value, slots, jnp.ones((batch, size), bool))

    @property
    def size(self) -> int:
        """S."""
        return self.at.shape[-1]

    def rows(self) -> KeyValue:
        """The same as `KeyValue`, with NaN where they were not finite."""
        return KeyValue(*rows_of(Columns(self.key, self.value, self.finite)), self.at, of_cache=True)

    def write(self, new: "KeyColumns", slot: Int[Array, ""] | int | np.integer) -> "KeyColumns":
        """These with `new` written from `slot` on, in all rows: one slice of each array, in place where it can be.

        Raises:
            ValueError: the new tokens do not fit, or shapes differ. Inside `jit`, where the former cannot be raised,
                they are written over the last slots as what was not finite: the loss of data shows in the output.
        """
        self.check_like(new)
        known, last = not isinstance(slot, jax.core.Tracer), self.size - new.size
        if last < 0 or (known and not _may_be_within(known_size(slot), last)):
            place = f" at slot {slot}" if known else ""
            raise ValueError(f"{new.size} tokens do not fit{place} into a cache of {self.size}")
        first = jnp.asarray(slot)
        fits = (first >= 0) & (first <= last)
        marked = dataclasses.replace(new, finite=new.finite & fits)
        # Without the barrier XLA would make the update a second time for its reader, from a copy of the old array.
        return lax.optimization_barrier(self.over_slots(_slices(slot), marked))

    def then(self, new: "KeyColumns") -> "KeyColumns":
        """These with `new` behind them."""
        self.check_like(new)
        return self.over_slots(lambda old, fresh, axis: jnp.concatenate([old, fresh], axis=axis), new)

    def scatter(self, slot: Int[Array, "B T"], new: "KeyColumns") -> "KeyColumns":
        """These with token t of row b in slot `slot[b, t]`; one behind the end is dropped."""
        row = jnp.arange(slot.shape[0])[:, None]

        def put(old: Array, fresh: Array, axis: int) -> Array:
            between = (slice(None),) * (axis - 1)
            return old.at[(row, *between, slot)].set(jnp.moveaxis(fresh, axis, 1), mode="drop")

        return self.over_slots(put, new)

    def repeat(self, beam_size: int) -> "KeyColumns":
        """These for each of `beam_size` hypotheses, one behind the other."""
        return self.over_slots(lambda x, axis: jnp.concatenate([x] * beam_size, axis=axis))

    def select(self, parent: Int[Array, "B beams"]) -> "KeyColumns":
        """Of hypotheses that lie one behind the other, those of `parent[:, j]` for each j: a copy."""
        beams = parent.shape[1]

        def take(x: Array, axis: int) -> Array:
            apart = x.reshape(*x.shape[:axis], beams, x.shape[axis] // beams, *x.shape[axis + 1 :])
            index = jnp.expand_dims(parent, [i for i in range(apart.ndim) if i not in (0, axis)])
            return jnp.take_along_axis(apart, index, axis=axis).reshape(x.shape)

        return self.over_slots(take)

    def over_slots(self, function: Callable[..., Array], *others: "KeyColumns") -> "KeyColumns":
        """`function(x, *others, axis)` of each array, with the axis of its slots; `visible` is left out."""

        def each(name: str, axis: int) -> Array:
            old = getattr(self, name)
            return function(old, *(getattr(other, name).astype(old.dtype) for other in others), axis)

        position = function(self.at.position, *(other.at.position for other in others), 1)
        segment = function(self.at.segment, *(other.at.segment for other in others), 1)
        return KeyColumns(each("key", 3), each("value", 2), Coordinates(position, segment), each("finite", 1))

    def check_like(self, new: "KeyColumns") -> None:
        """Raises ValueError unless all dims but the length agree: a smaller head would leave the rest of its slot."""
        for name, axis in (("key", 3), ("value", 2), ("finite", 1)):
            old, fresh = list(getattr(self, name).shape), list(getattr(new, name).shape)
            if old[:axis] + old[axis + 1 :] != fresh[:axis] + fresh[axis + 1 :]:
                raise ValueError(f"{name} {fresh} does not fit the cache's {old}: all dims but axis {axis} must agree")


def _may_be_within(slot: int, last: int) -> bool:
    """Whether a slot is from 0 to `last`, or may be where it is a symbolic dimension."""
    return may_exceed(slot, -1) and may_exceed(last + 1, slot)


def _slices(slot: Int[Array, ""] | int | np.integer) -> Callable[..., Array]:
    def update(old: Array, fresh: Array, axis: int) -> Array:
        return lax.dynamic_update_slice_in_dim(old, fresh, slot, axis=axis)

    return update
