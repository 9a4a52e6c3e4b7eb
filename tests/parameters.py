"""Modules with random parameters, made without compiling their initialisers."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Made = TypeVar("Made", bound=nnx.Module)


def drawn(make: Callable[[], Made], seed: int = 1) -> Made:
    """The module that `make` builds, every parameter normal with variance 1 / its first dim.

    Also the biases that start at zero and the scales that start at one: as they start, they would hide that a module
    does not use them. Running variances are the squares of such numbers. `make` builds its own `nnx.Rngs`, as it is
    traced.
    """
    random = np.random.default_rng(seed)

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        values = random.normal(size=x.shape) / x.shape[0] ** 0.5
        return jnp.asarray(values**2 if any("variance" in str(key) for key in path) else values, x.dtype)

    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))
