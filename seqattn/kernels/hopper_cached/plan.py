"""How a call is cut: the slots of a tile, and the parts into which the tiles of a row are shared out."""

import dataclasses
from typing import Any

import numpy as np

from seqattn.kernels.call import Call


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How shared memory is used.

    Attributes:
        queries: the rows of a product: 64, those of one wgmma.
        slots: slots of a tile. The size of a cache must be a multiple of it, because the GPU (TMA) copies whole tiles.
        ring: tiles of keys, and of values, that shared memory holds.
    """

    queries: int
    slots: int
    ring: int


TILINGS = {64: Tiling(64, 64, 4), 128: Tiling(64, 64, 4), 256: Tiling(64, 64, 2)}
"""Tilings by head dim. They compile for an H200 without a spilled register."""

_ROWS = 8
"""Rows are copied in multiples of this, those of a swizzled tile in shared memory."""

_BLOCKS = 2 * 132
"""A kernel has at least this many blocks if there are enough tiles: two for each core of an H200. Not measured."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call.

    Attributes:
        sizes: B, N, K, T, S and H, which is also V.
        dtype: of query, key and value.
        tiling: how shared memory is used.
        parts: how many blocks share the tiles of a batch row and key head.
        interpret: an `InterpretGPUParams`, to run the kernel in Pallas's interpreter, or None.
    """

    sizes: tuple[int, int, int, int, int, int]
    dtype: np.dtype
    tiling: Tiling
    parts: int
    interpret: Any

    @staticmethod
    def of(call: Call, *, interpret: Any = None) -> "Plan":
        """Returns the plan of a call."""
        batch, length, num_heads, head_dim = call.query.shape
        num_kv_heads, size = call.columns.value.shape[1:3]
        tiling = TILINGS[head_dim]
        sizes = (batch, num_heads, num_kv_heads, length, size, head_dim)
        parts = min(-(-_BLOCKS // (batch * num_kv_heads)), size // tiling.slots)
        return Plan(sizes, np.dtype(call.query.dtype), tiling, parts, interpret)

    @property
    def group(self) -> int:
        """The number of query heads that share a key head."""
        return self.sizes[1] // self.sizes[2]

    @property
    def rows(self) -> int:
        """The queries of all heads of a group, padded to what is copied."""
        return -(-self.group * self.sizes[3] // _ROWS) * _ROWS
