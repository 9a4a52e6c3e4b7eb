"""Masks and score modifications that read the indices of the whole call, on a device that counts its share from 0."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from seqattn.coordinates import Coordinates, Tile
from seqattn.kernels.call import Call, Origin
from seqattn.mask import Mask, Reach, reads
from seqattn.pytrees import pytree, static
from seqattn.score_mod import ScoreMod


@pytree
@dataclasses.dataclass(frozen=True)
class _ShiftedMask(Mask):
    """A mask that reads the indices of the whole call, on a device that counts its own rows and heads from 0.

    Attributes:
        inner: the mask.
        batch: the index of the device's first batch row.
        head: the index of its first query head.
        rows: the batch rows of the device and of the whole call; static.
    """

    inner: Mask
    batch: Any
    head: Any
    rows: tuple[int, int] = static()

    def __call__(self, query: Coordinates, key: Coordinates) -> Array:
        return self.inner(_shifted(query, self.batch, self.head), key)

    def reach(self, query: Tile, key: Tile) -> Reach:
        """Returns the reach of the mask for the device's rows."""
        own, whole = self.rows

        # The mask may hold an array with an entry for each row of the whole call. So it is asked about tiles of as many
        # rows, of which only the device's own are right, and the answers for these are kept.
        def placed(x: Any) -> Any:
            if x.shape[0] == 1:
                return x
            return lax.dynamic_update_slice_in_dim(jnp.zeros((whole, *x.shape[1:]), x.dtype), x, self.batch, axis=0)

        def kept(x: Any) -> Any:
            of_row = jnp.ndim(x) == 3 and x.shape[0] > 1
            return lax.dynamic_slice_in_dim(jnp.asarray(x), self.batch, own, axis=0) if of_row else x

        reach = self.inner.reach(*jax.tree.map(placed, (query, key)))
        return Reach(some=kept(reach.some), every=kept(reach.every))


@pytree
@dataclasses.dataclass(frozen=True)
class _ShiftedMod(ScoreMod):
    """A score modification that reads the indices of the whole call, likewise."""

    inner: ScoreMod
    batch: Any
    head: Any
    size: int = static()

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        return self.inner(score, _shifted(query, self.batch, self.head), key, head + self.head, row)

    @property
    def row_size(self) -> int:
        """The number of features of a row."""
        return self.size

    @property
    def uses_coordinates(self) -> bool:
        """Whether it reads coordinates."""
        return self.inner.uses_coordinates


def _shifted(query: Coordinates, batch: Any, head: Any) -> Coordinates:
    """Returns a query with its indices in the whole call."""
    own: tuple[Any, Any] = (query.batch, query.head)
    row, head = (None if x is None else x + by for x, by in zip(own, (batch, head), strict=True))
    return dataclasses.replace(query, batch=row, head=head)


def shifted_mask(call: Call, origin: Origin, parts: int) -> Any:
    """Returns the mask of a device's share of a call whose batch is split into `parts`."""
    if not isinstance(call.mask, Mask):
        return call.mask
    read, own = reads(call.mask, call.q_at, call.kv_at), call.query.shape[0]
    if not (read.batch or read.head):
        return call.mask
    return _ShiftedMask(call.mask, origin.batch, origin.head, (own, own * parts))


def shifted_mod(call: Call, origin: Origin) -> Any:
    """Returns the score modification of a device's share of a call."""
    mod = call.score_mod
    return None if mod is None else _ShiftedMod(mod, origin.batch, origin.head, mod.row_size)
