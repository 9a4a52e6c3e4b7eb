"""How a call is cut: the slots of a tile, and the key heads that one step of the grid reads together."""

import dataclasses

import numpy as np

from seqattn.kernels.call import Call
from seqattn.kernels.tpu.plan import MOST_WORDS

LISTS = 3
"""The number of lists that are read before the kernel starts: row, tile, flags."""

_TILES = (512, 256, 128)
"""Slots of a tile, the best first. A step of the grid should read more than a TPU reads while it starts the step."""

_MOST_BYTES = 11 * 2**20
"""Bytes of a step, of the 16 MB that a v5e has for a kernel. The compiler needs the rest for what it holds briefly."""

_LANES = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call.

    Attributes:
        sizes: B, N, K, T, S, H and V.
        dtypes: of query, key and value.
        tile: slots in a tile.
        heads: key heads of a step.
        interpret: whether Pallas interprets the kernel, without a TPU.
    """

    sizes: tuple[int, int, int, int, int, int, int]
    dtypes: tuple[np.dtype, np.dtype, np.dtype]
    tile: int
    heads: int
    interpret: bool

    @staticmethod
    def of(call: Call, *, interpret: bool) -> "Plan":
        """Returns the plan of a call.

        Raises:
            NotImplementedError: a tile of one head, or the lists of tiles, exceed the memory of a TPU.
        """
        batch, length, num_heads, head_dim = call.query.shape
        _, num_kv_heads, size, value_dim = call.columns.value.shape
        sizes = (batch, num_heads, num_kv_heads, length, size, head_dim, value_dim)
        dtypes = tuple(np.dtype(x.dtype) for x in (call.query, call.columns.key, call.columns.value))
        # Wide tiles first: with few heads in a step, its start costs more than what it reads.
        for tile in _TILES:
            for heads in range(num_kv_heads, 0, -1):
                # A tile of all slots needs no multiple of the lanes.
                plan = Plan(sizes, dtypes, min(tile, size), heads, interpret)
                if num_kv_heads % heads == 0 and plan.bytes <= _MOST_BYTES:
                    plan._check_lists()
                    return plan
        raise NotImplementedError(
            f"{plan.rows} queries of a key head, with head dims {head_dim} and {value_dim}, take {plan.bytes} bytes of "
            f"the {_MOST_BYTES} for a tile; cached takes any number"
        )

    @property
    def group(self) -> int:
        """The number of query heads that share a key head."""
        return self.sizes[1] // self.sizes[2]

    @property
    def rows(self) -> int:
        """The queries of all heads of a group, padded to the rows of a vector: 8 of float32, 16 of bfloat16."""
        least = 32 // self.product.itemsize
        return _padded(self.group * self.sizes[3], least)

    @property
    def product(self) -> np.dtype:
        """The dtype of the products of queries and keys: the wider one, so that nothing is rounded before."""
        return max(self.dtypes[:2], key=lambda dtype: dtype.itemsize)

    @property
    def tiles(self) -> int:
        """The number of tiles of a row."""
        return -(-self.sizes[4] // self.tile)

    @property
    def columns(self) -> bool:
        """Whether the kernel reads values as columns `[V, S]`.

        XLA stores an array `[S, V]` so that it is padded least: a dim that vectors do not fill is not the last one in
        memory. The kernel must read that form, or the compiler copies the whole cache in front of it.
        """
        size, value_dim = self.sizes[4], self.sizes[6]
        return _padded(value_dim, 8) * _padded(size, _LANES) < _padded(size, 8) * _padded(value_dim, _LANES)

    @property
    def bytes(self) -> int:
        """The memory for vectors that a step takes, by a count of its largest arrays."""
        (*_, head_dim, value_dim), (query, key, value) = self.sizes, self.dtypes
        wide, wide_value = (_padded(dim, _LANES) for dim in (head_dim, value_dim))
        of_value = value_dim if self.columns else wide_value
        read = self.tile * (head_dim * key.itemsize + of_value * value.itemsize + self.rows)
        read += self.rows * (wide * self.product.itemsize + wide_value * query.itemsize)
        # Float32 products are computed from three bfloat16 parts of each operand.
        parts = self.tile * (head_dim * (self.product.itemsize > 2) + of_value * (value.itemsize > 2)) * 6
        kept = self.rows * (wide_value + 2 * _LANES) * 4
        # Scores, weights and codes of the pairs. What is read and written is there twice: for this step and the next.
        return self.heads * (2 * read + parts + kept + 3 * self.rows * self.tile * 4)

    def _check_lists(self) -> None:
        if (words := LISTS * self.sizes[0] * self.tiles) > MOST_WORDS:
            raise NotImplementedError(
                f"{self.sizes[0]} rows of {self.tiles} tiles take {words} words; the memory for scalars holds "
                f"{MOST_WORDS}"
            )


def _padded(dim: int, multiple: int) -> int:
    return -(-dim // multiple) * multiple
