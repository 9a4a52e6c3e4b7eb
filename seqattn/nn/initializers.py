"""Initializers that draw in float32 or wider, whatever the dtype of the parameters.

`jax.random` draws in the requested dtype. A bfloat16 uniform number has 7 random bits, so a normal weight would have
one of 128 values, none beyond 2.9 standard deviations, with a mean of -0.015 standard deviations.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, PRNGKeyArray

from seqattn.precision import accumulator


def drawn_wide(initializer: Initializer) -> Initializer:
    """Wraps an initializer so that it draws in float32 or wider and then rounds to the requested dtype.

    A bfloat16 or float16 parameter is the float32 parameter, rounded. Float32 and float64 parameters do not change.

    >>> import jax
    >>> normal, key = drawn_wide(jax.nn.initializers.normal()), jax.random.key(0)
    >>> half, single = normal(key, (5,), jnp.float16), normal(key, (5,), jnp.float32)
    >>> print(half.dtype, jnp.array_equal(half, single.astype(jnp.float16)))
    float16 True
    """

    def draw(key: PRNGKeyArray, shape: Sequence[Any], dtype: Any = None, out_sharding: Any = None) -> Array:
        # Many custom initializers do not accept `out_sharding`.
        options = {} if out_sharding is None else {"out_sharding": out_sharding}
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits >= 32:
            return initializer(key, shape, dtype, **options)
        return initializer(key, shape, accumulator(dtype), **options).astype(dtype)

    return draw


lecun_normal = drawn_wide(nnx.initializers.lecun_normal())
"""Normal, truncated at two standard deviations, with variance 1 / fan_in (LeCun 1998). Flax's default for kernels."""
xavier_uniform = drawn_wide(nnx.initializers.xavier_uniform())
"""Uniform with variance 2 / (fan_in + fan_out) (Glorot 2010, equation 12)."""
orthogonal = drawn_wide(nnx.initializers.orthogonal())
"""Orthogonal rows or columns (Saxe 2013). Flax's default for recurrent kernels."""


def normal(stddev: float) -> Initializer:
    """Normal with mean 0 and standard deviation `stddev`; the same bits inside and outside of `jax.jit`."""

    def draw(key: PRNGKeyArray, shape: Sequence[Any], dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        options = {} if out_sharding is None else {"out_sharding": out_sharding}
        # `jax.random.normal` ends with a product by a constant. The barrier keeps XLA from multiplying both constants
        # first, which would round differently.
        drawn = jax.lax.optimization_barrier(jax.random.normal(key, shape, dtype, **options))
        return drawn * jnp.array(stddev, dtype)

    return drawn_wide(draw)
