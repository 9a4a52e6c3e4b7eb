"""Runs a sequence of layers, with optional rematerialisation and as an unrolled loop or a scan."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def run_layers(
    call: Callable[..., Array], x: Array, layers: Sequence[tuple[Any, ...]], *, remat: bool = False, scan: bool = False
) -> Array:
    """Applies `call(x, *layer)` for each layer in turn.

    Args:
        call: applies a layer to a vector. Its closed-over values are the same for all layers.
        x: input of the first layer.
        layers: what differs between layers, as pytrees: the module, its dropout key, its score modification.
        remat: if True, recomputes each layer in the backward pass and stores only the values between layers (Chen
            2016).
        scan: if True, stacks the parameters of the layers and runs one `jax.lax.scan`, so that XLA compiles one layer.

    Returns:
        The output of the last layer.

    Raises:
        ValueError: `scan` is True and the layers differ in structure, shapes or dtypes.

    >>> run_layers(lambda x, w: x * w, jnp.ones(()), [(jnp.array(2.0),), (jnp.array(3.0),)], scan=True)
    Array(6., dtype=float32)
    """
    call = jax.checkpoint(call) if remat else call
    if not scan or not layers:
        for layer in layers:
            x = call(x, *layer)
        return x
    # `jnp.stack` would fail on unequal layers with a message about arrays. Name the layer and the difference instead.
    for number, layer in enumerate(layers[1:], start=1):
        if (different := _difference(layers[0], layer)) is not None:
            raise ValueError(
                f"scan_layers needs layers of one kind, but layer {number} is not like layer 0: {different}"
            )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x, _ = jax.lax.scan(lambda x, layer: (call(x, *layer), None), x, stacked)
    return x


def _difference(first: Any, second: Any) -> str | None:
    """Describes how two layers differ in structure, or in the shape or dtype of an array; None if they do not."""
    if not jax.tree.structure(first) == jax.tree.structure(second):  # type: ignore[operator]  # noqa: SIM201
        return "it computes something else"
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True):
        if (jnp.shape(a), jnp.result_type(a)) != (jnp.shape(b), jnp.result_type(b)):
            return f"{jax.tree_util.keystr(path)} is {jnp.shape(a)} there and {jnp.shape(b)} here"
    return None
