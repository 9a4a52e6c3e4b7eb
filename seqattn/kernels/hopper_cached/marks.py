"""What the mask says of each slot and of each row, in a form that costs the kernel few bytes.

A slot has one bit for each row that sees it: 4 or 8 bytes, in place of 64 for an array of pairs. A row that sees a key
which is not finite is marked as a whole, so the kernel reads no marks of keys.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from seqattn.kernels.call import Columns

WORD = 32
"""Rows that have their bits in the same integer."""


def words_of(visible: Bool[Array, "..."]) -> Int[Array, "..."]:
    """Returns the bits `[B or 1, K or 1, words, S or 1]`, int32: bit i of word w says whether row `32 w + i` sees.

    One word serves all rows if they see the same slots.

    Args:
        visible: the rows of `over_cache.visible_rows`, `[B or 1, K or 1, rows or 1, S or 1]`.
    """
    rows = visible.shape[2]
    if rows == 1:
        return jnp.where(visible, jnp.int32(-1), jnp.int32(0))
    whole = jnp.pad(visible, ((0, 0), (0, 0), (0, -rows % WORD), (0, 0)))
    bits = whole.reshape(*visible.shape[:2], -1, WORD, visible.shape[3])
    powers = jnp.left_shift(jnp.int32(1), jnp.arange(WORD, dtype=jnp.int32))
    # Each bit is set once, so the sum is their union; the highest one is the sign.
    return jnp.where(bits, powers[:, None], jnp.int32(0)).sum(axis=3, dtype=jnp.int32)


def sees_lost(visible: Bool[Array, "..."] | None, columns: Columns) -> Bool[Array, "B _ _"]:
    """Returns which rows see a slot whose key or value was not finite, `[B, K or 1, rows or 1]`.

    Args:
        visible: as in `words_of`, or None if every row sees every slot.
        columns: the cache, which holds 0 there.
    """
    finite = columns.finite[:, None] if columns.finite.ndim == 2 else columns.finite
    lost = ~finite[:, :, None]
    return (lost if visible is None else lost & visible).any(axis=3)
