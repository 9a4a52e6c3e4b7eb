"""The arithmetic of a tile: marks make scores of products, and the online softmax adds them.

The kernel for the device, its interpreted form and the tests call these functions. What differs between them is a
`Units`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from seqattn.kernels.hopper.operations import LOG2_E
from seqattn.kernels.hopper.tile import Sums, add
from seqattn.kernels.hopper.units import Units
from seqattn.kernels.hopper_cached.marks import WORD


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The functions of a batch row and key head.

    Attributes:
        units: what differs between the device and the interpreter.
        scale: what products are multiplied by.
        marks: a reference to the marks in global memory (see `marks`), or the array itself.
        row: the batch row.
        head: the key head.
    """

    units: Units
    scale: Any
    marks: Any
    row: Any
    head: Any

    def weights(self, products: Float[Array, "Q S"], sums: Sums, first: Any) -> tuple[Float[Array, "Q S"], Sums]:
        """Returns the weights of a tile under the new maximum, and the sums of earlier tiles rescaled to it.

        Args:
            products: the products of queries and keys.
            sums: the state after the earlier tiles.
            first: the first slot of the tile.
        """
        head = self.head if self.marks.shape[1] > 1 else 0
        *words, finite = (
            self.units.vector(self.marks, (self.row, head, i), first, 1, products.shape)
            for i in range(self.marks.shape[2])
        )
        # The cache holds 0 for a key that is not finite. Its mark makes NaN the rows that see it, and no other.
        scores = jnp.where(finite != 0, products * self.scale, jnp.nan)
        if words:
            row = self.units.index(products.shape, 0)
            word = words[0] if len(words) == 1 else jnp.where(row < WORD, words[0], words[1])
            seen = lax.shift_right_logical(word, row & jnp.int32(WORD - 1)) & jnp.int32(1)
            scores = jnp.where(seen != 0, scores, -jnp.inf)
        return add(self.units, scores, sums, jnp.float32(LOG2_E))
