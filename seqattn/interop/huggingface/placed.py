"""Puts arrays on devices with one copy, also arrays that are views of a file mapped into memory."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

_ALIGNMENT = 64
"""Bytes. JAX on a CPU uses a NumPy array at such an address as it is, and copies any other."""
_TILE = 128
"""Rows and columns that are transposed at a time, so that reads and writes stay in the cache of the processor."""


def placed(part: np.ndarray, dtype: DTypeLike, sharding: Sharding | None) -> jax.Array:
    """Puts a copy of an array on devices.

    Each device's part is read, cast and copied at once, so a view of a file is read only where a device of this process
    needs it, and once for all devices with the same part.

    Args:
        part: the array, of any strides.
        dtype: dtype of the result.
        sharding: where it goes. If None, to the default device, as `jnp.asarray` does.
    """
    if sharding is None:
        return jax.device_put(_copy(part, np.dtype(dtype)))
    copies: dict[Any, np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        key = tuple((each.start, each.stop) for each in index)
        if key not in copies:
            copies[key] = _copy(part[index], np.dtype(dtype))
        return copies[key]

    return jax.make_array_from_callback(part.shape, sharding, shard)


def _copy(part: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a copy in C order that JAX on a CPU need not copy again."""
    memory = np.empty(part.size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + part.size * dtype.itemsize].view(dtype).reshape(part.shape)
    if part.ndim != 2 or part.strides[0] >= part.strides[1]:
        copy[...] = part
        return copy
    height, width = part.shape
    # Columns are read through rows with a gap between them: rows a power of two apart share few lines of the cache.
    columns = np.empty((_TILE, height + _ALIGNMENT // dtype.itemsize), dtype)[:, :height]
    for first in range(0, width, _TILE):
        block = columns[: width - first]
        block[...] = part[:, first : first + _TILE].T
        for row in range(0, height, _TILE):
            copy[row : row + _TILE, first : first + _TILE] = block[:, row : row + _TILE].T
    return copy
