"""Pooling of many vectors into one."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqattn.precision import accumulator


def mean_over_tokens(x: Float[Array, "*batch T D"], real: Bool[Array, "*batch T"]) -> Float[Array, "*batch D"]:
    """Mean of the vectors of real tokens; zeros if there are none. Padding may hold any values.

    Args:
        x: vectors `[*batch, T, D]`.
        real: `[*batch, T]`, True for tokens that count.

    Returns:
        `[*batch, D]`.

    >>> mean_over_tokens(jnp.array([[1.0], [3.0], [jnp.nan]]), jnp.array([True, True, False]))
    Array([2.], dtype=float32)
    """
    high = accumulator(x.dtype)
    # A sum in bfloat16 would lose small summands, so sum in float32 or wider.
    total = jnp.sum(jnp.where(real[..., None], x, jnp.zeros_like(x)), axis=-2, dtype=high)
    count = jnp.maximum(jnp.sum(real, axis=-1, keepdims=True), 1).astype(high)
    return (total / count).astype(x.dtype)
