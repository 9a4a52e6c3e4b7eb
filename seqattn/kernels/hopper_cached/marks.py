"""What the kernel knows of each slot: one bit for each query that sees it, and whether the cached key is finite.

A tile of marks takes 8 or 12 bytes a slot, in place of 64 for an array of pairs.
"""

import jax.numpy as jnp
from jaxtyping import Array

from seqattn.kernels.call import Columns
from seqattn.kernels.over_cache import visible_rows

WORD = 32
"""Rows that have their bits in the same integer."""


def marks_of(visible: Array | None, columns: Columns, num_heads: int, length: int) -> Array:
    """Returns the marks `[B, K or 1, words + 1, S]`, int32. Bit i of word w says whether row `32 w + i` sees the slot.

    The last row is 1 where key and value were finite. Without a mask there are no words. One word serves all rows if
    they see the same slots.

    Args:
        visible: the pairs that the mask shows, `[B or 1, N or 1, T or 1, S or 1]`, or None.
        columns: the cache, which marks keys that are not finite.
        num_heads: N.
        length: T.
    """
    batch, num_kv_heads, size, _ = columns.value.shape
    finite = columns.finite[:, None] if columns.finite.ndim == 2 else columns.finite
    found = [finite[:, :, None].astype(jnp.int32)]
    if visible is not None:
        found.insert(0, _words(visible_rows(visible, num_kv_heads, num_heads // num_kv_heads, length)))
    heads = max(x.shape[1] for x in found)
    return jnp.concatenate([jnp.broadcast_to(x, (batch, heads, x.shape[2], size)) for x in found], axis=2)


def _words(visible: Array) -> Array:
    """Returns the words of rows `[B or 1, K or 1, rows or 1, S or 1]`."""
    rows = visible.shape[2]
    if rows == 1:
        return jnp.where(visible, jnp.int32(-1), jnp.int32(0))
    whole = jnp.pad(visible, ((0, 0), (0, 0), (0, -rows % WORD), (0, 0)))
    bits = whole.reshape(*visible.shape[:2], -1, WORD, visible.shape[3])
    powers = jnp.left_shift(jnp.int32(1), jnp.arange(WORD, dtype=jnp.int32))
    # Each bit is set once, so the sum is their union; the highest one is the sign.
    return jnp.where(bits, powers[:, None], jnp.int32(0)).sum(axis=3, dtype=jnp.int32)
