"""Attention of a few queries to keys that lie as a cache keeps them, so that a step copies and transposes none.

Keys are `[B, K, H, S]` and values `[B, K, S, V]`: both products of a step read them in the order in which they lie. All
scores are in memory. The contract is that of `reference`, but whoever keeps the keys has looked at each of them once:
keys and values are finite, and `finite` tells which stand for some that were not.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from seqattn.kernels.reference import softmax
from seqattn.precision import accumulator


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K H S"],
    value: Float[Array, "B K S V"],
    *,
    finite: Bool[Array, "B S"],
    visible: Bool[Array, "rows heads T S"] | None,
    scale: float,
    modify: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T N V"]:
    """The output, in the query's dtype; a row that sees a key or value which was not finite is NaN.

    Args:
        query: N query heads, a multiple of the K key heads.
        key: finite keys.
        value: finite values.
        finite: False where key or value have zeros for what was not finite.
        visible: which pairs may attend, `[B or 1, N or 1, T, S]`; None for all.
        scale: multiplies the scores.
        modify: what is done to the scores `[B, N, T, S]` of visible pairs after that.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads, size = key.shape[1], key.shape[3]
    group, high = num_heads // num_kv_heads, accumulator(query.dtype)
    if visible is not None:
        # The query of an empty row may hold anything.
        query = jnp.where(visible.any(axis=-1).swapaxes(1, 2)[..., None], query, jnp.zeros_like(query))
    columns = query.reshape(batch, length, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    columns = columns.reshape(batch, num_kv_heads, group * length, head_dim)
    scores = _product("bkth,bkhs->bkts", columns, key, high).reshape(batch, num_heads, length, size) * scale
    if modify is not None:
        # As in the other kernels, a score modification never sees what a hidden pair holds.
        scores = modify(scores if visible is None else jnp.where(visible, scores, jnp.zeros_like(scores)))
        allowed = scores != -jnp.inf
        visible = allowed if visible is None else visible & allowed
    bad = jnp.where(finite, 0.0, jnp.nan).astype(high)
    weights, _ = softmax(scores + bad[:, None, None], visible)
    weights = weights.reshape(batch, num_kv_heads, group * length, size).astype(value.dtype)
    output = _product("bkts,bksv->bktv", weights, value, high)
    output = output.reshape(batch, num_kv_heads, group, length, value.shape[-1]).transpose(0, 3, 1, 2, 4)
    return output.reshape(batch, length, num_heads, value.shape[-1]).astype(query.dtype)


def _product(subscripts: str, left: Array, right: Array, high: jnp.dtype) -> Array:
    return jnp.einsum(subscripts, left, right, precision=lax.Precision.HIGHEST, preferred_element_type=high)
