"""One layer after the other: kept for the backward pass or computed again, written out or as one loop."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def run_layers(
    call: Callable[..., Array], x: Array, layers: Sequence[tuple[Any, ...]], *, remat: bool = False, scan: bool = False
) -> Array:
    """`x` after `call(x, *layer)` for each layer.

    Args:
        call: what a layer does to a vector; what it closes over is the same for all layers.
        x: what the first layer sees.
        layers: what each layer has of its own: its module, its key, its score modification; pytrees.
        remat: compute each layer again in the backward pass, so that only what is between layers is kept (Chen 2016).
        scan: one `jax.lax.scan` over the layers, whose parameters are stacked for it: one layer is compiled.

    Raises:
        ValueError: the layers to scan are not of one kind.

    >>> run_layers(lambda x, w: x * w, jnp.ones(()), [(jnp.array(2.0),), (jnp.array(3.0),)], scan=True)
    Array(6., dtype=float32)
    """
    call = jax.checkpoint(call) if remat else call
    if not scan or not layers:
        for layer in layers:
            x = call(x, *layer)
        return x
    for number, layer in enumerate(layers[1:], start=1):
        if (different := _difference(layers[0], layer)) is not None:
            raise ValueError(
                f"scan_layers needs layers of one kind, but layer {number} is not like layer 0: {different}"
            )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x, _ = jax.lax.scan(lambda x, layer: (call(x, *layer), None), x, stacked)
    return x


def _difference(first: Any, second: Any) -> str | None:
    """In what two layers differ: structure, or the shape or dtype of an array."""
    if not jax.tree.structure(first) == jax.tree.structure(second):  # type: ignore[operator]  # noqa: SIM201
        return "it computes something else"
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True):
        if (jnp.shape(a), jnp.result_type(a)) != (jnp.shape(b), jnp.result_type(b)):
            return f"{jax.tree_util.keystr(path)} is {jnp.shape(a)} there and {jnp.shape(b)} here"
    return None
