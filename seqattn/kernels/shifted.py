"""Masks and score modifications that read the indices of the whole call, on a device that counts its share from 0."""

import dataclasses
from typing import Any

from jaxtyping import Array

from seqattn.coordinates import Coordinates
from seqattn.kernels.call import Call, Origin
from seqattn.mask import Mask, reads
from seqattn.pytrees import pytree, static
from seqattn.score_mod import ScoreMod


@pytree
@dataclasses.dataclass(frozen=True)
class _ShiftedMask(Mask):
    """A mask that reads the indices of the whole call, on a device that counts its own rows and heads from 0."""

    inner: Mask
    batch: Any
    head: Any

    def __call__(self, query: Coordinates, key: Coordinates) -> Array:
        return self.inner(_shifted(query, self.batch, self.head), key)

    def reach(self, query: Any, key: Any) -> Any:
        """Returns the reach of the mask, which does not depend on these indices."""
        return self.inner.reach(query, key)


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


def shifted_mask(call: Call, origin: Origin) -> Any:
    """Returns the mask of a device's share of a call."""
    if not isinstance(call.mask, Mask):
        return call.mask
    read = reads(call.mask, call.q_at, call.kv_at)
    return _ShiftedMask(call.mask, origin.batch, origin.head) if read.batch or read.head else call.mask


def shifted_mod(call: Call, origin: Origin) -> Any:
    """Returns the score modification of a device's share of a call."""
    mod = call.score_mod
    return None if mod is None else _ShiftedMod(mod, origin.batch, origin.head, mod.row_size)
