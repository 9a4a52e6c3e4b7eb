"""Which arrays have gradients, what derivative rules return for those that have none; gradients have none."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def is_floating(x: Any) -> bool:
    """Returns whether an array has a gradient."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def no_gradient(x: Any) -> Array | np.ndarray:
    """Returns zeros for an array that no gradient reaches: of dtype `float0` for integers, as JAX requires."""
    return jnp.zeros(jnp.shape(x), jnp.result_type(x)) if is_floating(x) else np.zeros(jnp.shape(x), jax.dtypes.float0)


def refuse_second(*anything: Any) -> Any:
    """Takes the place of the derivative rules of gradients."""
    raise NotImplementedError("second derivatives of attention are only supported by 'reference'")
