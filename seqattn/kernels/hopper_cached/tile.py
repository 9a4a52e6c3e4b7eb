"""The arithmetic of a tile: the mask hides pairs, and the online softmax adds the others.

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
        words: a list of a reference to the bits `[B or 1, K or 1, words, S]` in global memory (see `marks`), or of the
            array itself; empty without a mask.
        row: the batch row.
        head: the key head.
    """

    units: Units
    scale: Any
    words: Any
    row: Any
    head: Any

    def bits(self, first: Any, slots: int) -> list[Array]:
        """Loads the words of a tile, which begins at the slot `first`."""
        found = []
        for array in self.words:
            at = (self.row if array.shape[0] > 1 else 0, self.head if array.shape[1] > 1 else 0)
            found += [self.units.part(array, (*at, i), first, slots, 1) for i in range(array.shape[2])]
        return found

    def weights(self, products: Float[Array, "Q S"], bits: list[Array], sums: Sums) -> tuple[Float[Array, "Q S"], Sums]:
        """Returns the weights of a tile under the new maximum, and the sums of earlier tiles rescaled to it.

        Args:
            products: the products of queries and keys, NaN for a query whose row is to be NaN.
            bits: the words of the tile.
            sums: the state after the earlier tiles.
        """
        scores = products * self.scale
        if bits:
            row = self.units.index(scores.shape, 0)
            words = [self.units.spread(each, scores.shape, 1) for each in bits]
            word = words[0] if len(words) == 1 else jnp.where(row < WORD, words[0], words[1])
            seen = lax.shift_right_logical(word, row & jnp.int32(WORD - 1)) & jnp.int32(1)
            scores = jnp.where(seen != 0, scores, -jnp.inf)
        return add(self.units, scores, sums, jnp.float32(LOG2_E))
