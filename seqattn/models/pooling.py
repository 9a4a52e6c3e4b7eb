"""Many vectors to one."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqattn.precision import accumulator


def mean_over_tokens(x: Float[Array, "*batch T D"], real: Bool[Array, "*batch T"]) -> Float[Array, "*batch D"]:
    """The mean of the vectors of real tokens; zeros where there are none. What is not real may hold anything.

    Args:
        x: vectors `[*batch, T, D]`.
        real: which of them count, `[*batch, T]`.

    >>> mean_over_tokens(jnp.array([[1.0], [3.0], [jnp.nan]]), jnp.array([True, True, False]))
    Array([2.], dtype=float32)
    """
    high = accumulator(x.dtype)
    total = jnp.sum(jnp.where(real[..., None], x, jnp.zeros_like(x)), axis=-2, dtype=high)
    count = jnp.maximum(jnp.sum(real, axis=-1, keepdims=True), 1).astype(high)
    return (total / count).astype(x.dtype)
