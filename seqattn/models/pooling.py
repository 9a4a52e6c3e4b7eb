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


def first_token(x: Float[Array, "*batch T D"], real: Bool[Array, "*batch T"]) -> Float[Array, "*batch D"]:
    """The vector of the first real token; zeros if there is none.

    Args:
        x: vectors `[*batch, T, D]`.
        real: `[*batch, T]`, True for tokens that count.

    Returns:
        `[*batch, D]`.

    >>> first_token(jnp.array([[jnp.nan], [3.0], [5.0]]), jnp.array([False, True, True]))
    Array([3.], dtype=float32)
    """
    index = jnp.argmax(real, axis=-1)[..., None, None]
    first = jnp.take_along_axis(x, index, axis=-2)[..., 0, :]
    return jnp.where(real.any(axis=-1, keepdims=True), first, jnp.zeros_like(first))
