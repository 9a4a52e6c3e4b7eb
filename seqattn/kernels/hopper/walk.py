"""Which tiles each block visits, as lists in global memory: full tiles, in which every pair is visible, come first."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqattn.kernels import blocks
from seqattn.pytrees import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Walk:
    """The lists of the blocks that own tiles of one side and visit tiles of the other.

    Attributes:
        counts: `[B or 1, I, 2]`: how many full and how many partial tiles each block visits.
        tiles: `[B or 1, I, J]`: the indices of these tiles, full ones first, before all others.
    """

    counts: Any
    tiles: Any

    @staticmethod
    def of(kinds: np.ndarray | Array) -> "Walk":
        """Returns the lists from the kind of each tile `[B or 1, I, J]`, as `blocks.kinds_of_tiles` returns it."""
        xp = jnp if isinstance(kinds, jax.Array) else np
        full, partial = kinds == blocks.FULL, kinds == blocks.PARTIAL
        counts = xp.stack([x.sum(axis=-1, dtype=np.int32) for x in (full, partial)], axis=-1)
        rank = xp.where(full, np.int32(0), xp.where(partial, np.int32(1), np.int32(2)))
        return Walk(counts, xp.argsort(rank, axis=-1, stable=True).astype(np.int32))
