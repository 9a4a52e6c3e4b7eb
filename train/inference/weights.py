"""The numbers that a model decodes with: as they were trained, in bfloat16, or in int8."""

import enum
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx

from seqattn.nn import Quantized, quantized

Model = TypeVar("Model", bound=nnx.Module)


class Weights(enum.Enum):
    """The numbers that a model decodes with."""

    TRAINED = "trained"
    """As they are."""
    BFLOAT16 = "bfloat16"
    """All in bfloat16: half the memory of float32."""
    INT8 = "int8"
    """Kernels and tables of tokens in int8, with a scale for each output: a quarter of the memory of float32."""


def with_weights(model: Model, weights: Weights) -> Model:
    """Returns a model like `model` with other numbers; `model` does not change.

    Raises:
        ValueError: int8 is asked for, and a kernel has a number that is not finite.
    """
    if weights is Weights.INT8:
        return quantized(model, tables=True)
    if weights is Weights.TRAINED:
        return model
    graph, state = nnx.split(model)

    def cast(_: tuple[object, ...], leaf: nnx.Variable) -> nnx.Variable:
        value = leaf[...]
        is_float = jnp.issubdtype(value.dtype, jnp.floating)
        return leaf.replace(value.astype(jnp.bfloat16)) if is_float and not isinstance(leaf, Quantized) else leaf

    changed: Model = nnx.merge(graph, nnx.map_state(cast, state))
    return changed
