"""In which precision sums, exponentials and angles are computed."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def accumulator(dtype: DTypeLike) -> np.dtype:
    """float64 for float64, float32 for every smaller floating dtype.

    Unlike `jnp.promote_types` this also answers under strict dtype promotion.

    >>> accumulator(jnp.bfloat16)
    dtype('float32')
    """
    return np.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def lowest(dtype: DTypeLike) -> float:
    """The lowest finite number of a floating dtype: in kernels, the logit of what is hidden.

    -inf would do as well, but not under `jax.debug_infs`, which stops at every one that is computed.

    >>> lowest(jnp.bfloat16) == -3.3895313892515355e38
    True
    """
    return float(jnp.finfo(dtype).min)
