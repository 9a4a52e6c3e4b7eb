"""Keys and values with the coordinates of their tokens: `KeyValue` for whole texts, `KeyColumns` for cached steps."""

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
    """Keys and values that queries attend to.

    Attributes:
        key: `[*batch, S, K, H]`.
        value: `[*batch, S, K, V]`.
        at: coordinates `[*batch, S]`; padding has segment 0.
        of_cache: True if these are the slots of a cache, some of which may never have been written.
    """

    key: Array
    value: Array
    at: Coordinates
    of_cache: bool = static(default=False)


_NEVER = -(2**30)
"""Position of a cache slot that was never written. Half of the int32 range, since masks subtract positions."""


@pytree
@dataclasses.dataclass(frozen=True)
class Written(Mask):
    """Mask that admits the written slots of a cache."""

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return key.position != _NEVER

    def reach(self, query: Tile, key: Tile) -> Reach:
        return Reach(some=key.position_max != _NEVER, every=key.position_min != _NEVER)


@pytree
@dataclasses.dataclass(frozen=True)
class KeyColumns:
    """Keys and values laid out for decoding steps, which read them without copying or checking.

    Attributes:
        key: `[B, K, H, S]`, one column per token.
        value: `[B, K, S, V]`.
        at: coordinates `[B, S]`. A cache slot that was never written is padding (segment 0) at a reserved position, by
            which `Written` distinguishes it from written padding.
        finite: `[B, S]`, False for a token whose key or value had a non-finite entry. Its key and value are stored as
            0.
        visible: `[B, T, S]`, which keys each query may see in addition to the mask, or None for no such limit.
            Hypotheses of one text share coordinates but see only their own keys of the pool.
    """

    key: Array
    value: Array
    at: Coordinates
    finite: Bool[Array, "B S"]
    visible: Bool[Array, "B T S"] | None = None

    @staticmethod
    def of(kv: KeyValue, dtype: DTypeLike | None = None) -> "KeyColumns":
        """Converts keys and values `[B, S, K, H]` to columns.

        Args:
            kv: keys and values with exactly one batch dimension.
            dtype: dtype of the columns. Defaults to the dtypes of `kv`.

        Raises:
            ValueError: `kv` does not have exactly one batch dimension.
        """
        if kv.key.ndim != 4:
            raise ValueError(f"columns have one batch dim: key must be [B, S, K, H], got {kv.key.shape}")
        # Cast first: a finite float32 value may overflow to infinity in a smaller dtype.
        given = [x if dtype is None else x.astype(dtype) for x in (kv.key, kv.value)]
        # A masked weight is 0, but 0 times NaN is NaN. Zeros keep such a token harmless while it is masked, and the
        # flag makes the output NaN where it is visible.
        finite = jnp.isfinite(given[0]).all(axis=(-2, -1)) & jnp.isfinite(given[1]).all(axis=(-2, -1))
        key, value = (jnp.where(finite[..., None, None], x, jnp.zeros_like(x)) for x in given)
        at = jax.tree.map(lambda field: jnp.broadcast_to(field, finite.shape), kv.at)
        # In these layouts neither matrix product of a step has to transpose what it reads.
        return KeyColumns(key.transpose(0, 2, 3, 1), value.swapaxes(1, 2), at, finite)

    @staticmethod
    def empty(
        batch: int, size: int, num_kv_heads: int, head_dim: int, *, value_dim: int, dtype: DTypeLike
    ) -> "KeyColumns":
        """Creates `size` slots that are all padding.

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
        """S, the number of slots."""
        return self.at.shape[-1]

    def rows(self) -> KeyValue:
        """Returns the same keys and values as a `KeyValue`, with NaN for the tokens that were not finite."""
        return KeyValue(*rows_of(Columns(self.key, self.value, self.finite)), self.at, of_cache=True)

    def write(self, new: "KeyColumns", slot: Int[Array, ""] | int | np.integer) -> "KeyColumns":
        """Returns these columns with `new` written from `slot` on, in all rows.

        Updates one slice per array, in place if XLA can.

        Raises:
            ValueError: the new tokens do not fit, or shapes differ. Inside `jit` a traced `slot` cannot raise: tokens
                that do not fit overwrite the last slots and are marked non-finite, so the loss shows as NaN in the
                output.
        """
        self.check_like(new)
        known, last = not isinstance(slot, jax.core.Tracer), self.size - new.size
        if last < 0 or (known and not _may_be_within(known_size(slot), last)):
            place = f" at slot {slot}" if known else ""
            raise ValueError(f"{new.size} tokens do not fit{place} into a cache of {self.size}")
        first = jnp.asarray(slot)
        # `dynamic_update_slice` clamps the start, and would overwrite older tokens silently. Mark the new ones.
        fits = (first >= 0) & (first <= last)
        marked = dataclasses.replace(new, finite=new.finite & fits)
        # Without the barrier XLA fuses the update into its reader and repeats it there, from a copy of the old array.
        return lax.optimization_barrier(self.over_slots(_slices(slot), marked))

    def then(self, new: "KeyColumns") -> "KeyColumns":
        """Returns these columns followed by `new`."""
        self.check_like(new)
        return self.over_slots(lambda old, fresh, axis: jnp.concatenate([old, fresh], axis=axis), new)

    def scatter(self, slot: Int[Array, "B T"], new: "KeyColumns") -> "KeyColumns":
        """Returns these columns with token t of row b in slot `slot[b, t]`. Drops tokens whose slot is past the end."""
        row = jnp.arange(slot.shape[0])[:, None]

        def put(old: Array, fresh: Array, axis: int) -> Array:
            # Advanced indices around slices put the indexed axes first, so the tokens of `fresh` move to axis 1.
            between = (slice(None),) * (axis - 1)
            return old.at[(row, *between, slot)].set(jnp.moveaxis(fresh, axis, 1), mode="drop")

        return self.over_slots(put, new)

    def repeat(self, beam_size: int) -> "KeyColumns":
        """Returns these columns `beam_size` times along the slots, one copy per hypothesis."""
        return self.over_slots(lambda x, axis: jnp.concatenate([x] * beam_size, axis=axis))

    def select(self, parent: Int[Array, "B beams"]) -> "KeyColumns":
        """Copies, for each j, the columns of hypothesis `parent[:, j]`.

        Hypotheses follow one another along the slots, with an equal number of slots each.
        """
        beams = parent.shape[1]

        def take(x: Array, axis: int) -> Array:
            # Split the slots into hypotheses, so that one gather moves whole blocks of slots.
            apart = x.reshape(*x.shape[:axis], beams, x.shape[axis] // beams, *x.shape[axis + 1 :])
            index = jnp.expand_dims(parent, [i for i in range(apart.ndim) if i not in (0, axis)])
            return jnp.take_along_axis(apart, index, axis=axis).reshape(x.shape)

        return self.over_slots(take)

    def over_slots(self, function: Callable[..., Array], *others: "KeyColumns") -> "KeyColumns":
        """Applies `function(x, *others, axis)` to each array, where `axis` is its slot axis. Drops `visible`."""

        def each(name: str, axis: int) -> Array:
            old = getattr(self, name)
            return function(old, *(getattr(other, name).astype(old.dtype) for other in others), axis)

        position = function(self.at.position, *(other.at.position for other in others), 1)
        segment = function(self.at.segment, *(other.at.segment for other in others), 1)
        return KeyColumns(each("key", 3), each("value", 2), Coordinates(position, segment), each("finite", 1))

    def check_like(self, new: "KeyColumns") -> None:
        """Checks that all dimensions of `new` except the number of slots match.

        Raises:
            ValueError: a dimension differs. A smaller head would fill only part of its slot.
        """
        for name, axis in (("key", 3), ("value", 2), ("finite", 1)):
            old, fresh = list(getattr(self, name).shape), list(getattr(new, name).shape)
            if old[:axis] + old[axis + 1 :] != fresh[:axis] + fresh[axis + 1 :]:
                raise ValueError(f"{name} {fresh} does not fit the cache's {old}: all dims but axis {axis} must agree")


def _may_be_within(slot: int, last: int) -> bool:
    """Whether `slot` is in `[0, last]`, or may be for a symbolic dimension."""
    return may_exceed(slot, -1) and may_exceed(last + 1, slot)


def _slices(slot: Int[Array, ""] | int | np.integer) -> Callable[..., Array]:
    def update(old: Array, fresh: Array, axis: int) -> Array:
        return lax.dynamic_update_slice_in_dim(old, fresh, slot, axis=axis)

    return update
