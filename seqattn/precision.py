"""The precision in which sums, exponentials and angles are computed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def accumulator(dtype: DTypeLike) -> np.dtype:
    """Returns float64 for float64, and float32 for every smaller floating dtype.

    Unlike `jnp.promote_types` it also works under strict dtype promotion.

    >>> accumulator(jnp.bfloat16)
    dtype('float32')
    """
    return np.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def lowest(dtype: DTypeLike) -> float:
    """Returns the lowest finite number of a floating dtype, which kernels use as the logit of masked pairs.

    -inf would serve as well, except under `jax.debug_infs`, which stops at every computed infinity.

    >>> lowest(jnp.bfloat16) == -3.3895313892515355e38
    True
    """
    return float(jnp.finfo(dtype).min)


def widened(tree: Any) -> Any:
    """Returns the tree with its 16-bit floating arrays converted to float32. All other leaves stay as they are.

    >>> widened({"kernel": jnp.ones(2, jnp.bfloat16), "count": jnp.arange(2)})
    {'count': Array([0, 1], dtype=int32), 'kernel': Array([1., 1.], dtype=float32)}
    """

    def wide(leaf: Any) -> Any:
        is_small = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != accumulator(leaf.dtype)
        return leaf.astype(accumulator(leaf.dtype)) if is_small else leaf

    return jax.tree.map(wide, tree)
