"""Weights in int8 for decoding: one scale for each output of a layer, symmetric around zero.

A step of decoding reads every weight once, so its time on an accelerator is mostly that of reading them. The values
are converted inside the compiled step, and the scale multiplies the product, which has fewer elements than the kernel.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from seqattn.nn.embedding import TokenEmbedding, look_up
from seqattn.nn.linear import Linear
from seqattn.nn.mixture import MixtureOfExperts
from seqattn.platforms import all_platforms, by_platform
from seqattn.precision import accumulator

Model = TypeVar("Model", bound=nnx.Module)

_LARGEST = 127
"""-128 is not used, so that the values are symmetric."""
_TILE = 2**17
"""Weights that the CPU converts at a time, so that their floats stay in its cache."""
_GATES = ("gate", "noise")
"""Layers of a mixture that choose experts."""


class Quantized(nnx.Variable[Array]):
    """A quantized weight: int8 values, or their scale. It is no `nnx.Param`, so no optimizer updates it."""


def to_int8(weights: Float[Array, "*shape"], axis: int) -> tuple[Int8[Array, "*shape"], Float[Array, "..."]]:
    """Rounds weights to int8 with one scale for each output.

    No value differs from its weight by more than half its scale. Outputs whose weights are all zero have scale 1.

    Args:
        weights: finite weights.
        axis: the axis of the inputs, which share a scale.

    Returns:
        The values, and their scale in the dtype of the weights, without `axis`. The largest magnitude among the inputs
        of an output is 127.

    >>> values, scale = to_int8(jnp.array([[0.5, -1.0], [0.25, 127.0]]), axis=0)
    >>> values.tolist(), [round(float(each), 4) for each in scale]
    ([[127, -1], [64, 127]], [0.0039, 1.0])
    """
    exact = weights.astype(accumulator(weights.dtype))
    scale = (jnp.max(jnp.abs(exact), axis, initial=0) / _LARGEST).astype(weights.dtype)
    # A processor may take smaller numbers than `tiny` for zero.
    scale = jnp.where(scale < jnp.finfo(scale.dtype).tiny, jnp.ones_like(scale), scale)
    values = jnp.round(exact / jnp.expand_dims(scale, axis).astype(exact.dtype))
    return jnp.clip(values, -_LARGEST, _LARGEST).astype(jnp.int8), scale


def _product(
    x: Float[Array, "*batch D"], values: Int8[Array, "D F"], scale: Float[Array, "F"]
) -> Float[Array, "*batch F"]:
    """Returns `x @ (values * scale)` in the dtype of `x`, summed in float32 at least."""
    # With several devices the compiler splits the plain form, see `seqattn.nn.linear`.
    forms = {name: _by_tiles if name == "cpu" else _at_once for name in all_platforms()}
    total = by_platform(forms, x, values) if jax.device_count() == 1 else _at_once(x, values)
    return (total * scale.astype(total.dtype).reshape((1,) * (total.ndim - 1) + (-1,))).astype(x.dtype)


def _at_once(x: Float[Array, "*batch D"], values: Int8[Array, "D F"]) -> Float[Array, "*batch F"]:
    # Otherwise XLA converts all kernels once, before the loop of decoding, and keeps them as floats. What depends on a
    # token cannot leave the loop.
    values, _ = jax.lax.optimization_barrier((values, jax.lax.stop_gradient(x)))
    return jnp.matmul(x, values.astype(x.dtype), preferred_element_type=accumulator(x.dtype))


def _by_tiles(x: Float[Array, "*batch D"], values: Int8[Array, "D F"]) -> Float[Array, "*batch F"]:
    """Converts one tile of outputs at a time.

    XLA's product on the CPU reads floats from memory, and its scheduler converts the kernels of all layers at once.
    """
    width = max(1, _TILE // max(1, len(values)))
    tiles = values.shape[1] // width

    def tile(first: Int[Array, ""]) -> Float[Array, "*batch width"]:
        return _at_once(x, jax.lax.dynamic_slice_in_dim(values, first, width, axis=1))

    rest = _at_once(x, values[:, tiles * width :])
    if not tiles:
        return rest
    whole = jnp.moveaxis(jax.lax.map(tile, width * jnp.arange(tiles)), 0, -2)
    return jnp.concatenate([whole.reshape(*x.shape[:-1], tiles * width), rest], axis=-1)


class QuantizedLinear(nnx.Module):
    """A linear layer with a kernel of int8 values. Takes the place of `nnx.Linear`; made by `quantized`.

    Args:
        layer: the layer, or layers that are stacked over leading axes.

    >>> layer = Linear(3, 5, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 3))
    >>> bool(jnp.abs(QuantizedLinear(layer)(x) - layer(x)).max() < 0.02)
    True
    """

    def __init__(self, layer: nnx.Linear) -> None:
        values, scale = to_int8(layer.kernel[...], axis=-2)
        self.values, self.scale = Quantized(values), Quantized(scale)
        self.bias = layer.bias
        self.dtype, self.promote_dtype = layer.dtype, layer.promote_dtype

    @property
    def kernel(self) -> Float[Array, "*stack D F"]:
        """The kernel as floats, in the dtype that it had."""
        return _floats(self.values[...], self.scale[...], axis=-2)

    def __call__(self, inputs: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
        """Returns `inputs @ kernel + bias`, `[*batch, F]`, in the dtype of the layer that this one replaces."""
        bias = None if self.bias is None else self.bias[...]
        x, scale, bias = self.promote_dtype((inputs, self.scale[...], bias), dtype=self.dtype)
        y = _product(x, self.values[...], scale)
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class QuantizedEmbedding(TokenEmbedding):
    """A token embedding with a table of int8 values, also for tied logits. Made by `quantized`.

    Args:
        embedding: the embedding.
    """

    def __init__(self, embedding: TokenEmbedding) -> None:
        # Each row is the vector of a token, and gives one logit.
        values, scale = to_int8(embedding.table[...], axis=-1)
        self.values, self.row_scale, self.scale = Quantized(values), Quantized(scale), embedding.scale

    @property
    def table(self) -> Float[Array, "V D"]:  # type: ignore[override]
        """The table as floats, in the dtype that it had."""
        return _floats(self.values[...], self.row_scale[...], axis=-1)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """Returns the scaled vectors `[*batch, D]`, as `TokenEmbedding` does."""
        # A token outside of the vocabulary has the scale NaN.
        scale = look_up(self.row_scale[...][:, None], tokens, "tokens")
        values = jnp.take(self.values[...], tokens, axis=0, mode="clip")
        vectors = values.astype(scale.dtype) * scale
        return vectors if self.scale == 1 else vectors * jnp.asarray(self.scale, vectors.dtype)

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Returns the product of `x` `[*batch, D]` with every vector of the table, `[*batch, V]`."""
        return _product(x, self.values[...].T, self.row_scale[...])


def quantized(model: Model, *, tables: bool = False) -> Model:
    """Returns a model like `model` whose linear layers have int8 kernels. `model` does not change.

    Caches, `generate`, beam search and gradients with respect to inputs work as before. The kernels are not trainable:
    they are variables of the kind `Quantized`. Convolutions, norms, biases, and the gates that choose experts stay as
    they are.

    Args:
        model: any module with concrete parameters. The copy shares those that are not quantized.
        tables: whether token embeddings are quantized, too. Logits that are tied to them are then computed from int8.

    Raises:
        ValueError: the model is already quantized, has nothing to quantize, is traced by `jit`, or a kernel has a
            number that is not finite. Names the kernel.

    >>> layer = nnx.Sequential(Linear(3, 5, rngs=nnx.Rngs(0)), Linear(5, 2, rngs=nnx.Rngs(1)))
    >>> small = quantized(layer)
    >>> small.layers[0].values.dtype, small(jnp.ones((7, 3))).shape
    (dtype('int8'), (7, 2))
    """
    chosen = _chosen(model, tables)

    def replaced(path: tuple[Any, ...], node: Any) -> Any:
        if path not in chosen:
            return node
        return QuantizedEmbedding(node) if isinstance(node, TokenEmbedding) else QuantizedLinear(node)

    small: Model = nnx.recursive_map(replaced, model)
    return small


def quantization_errors(model: nnx.Module, *, tables: bool = False) -> dict[str, float]:
    """Returns by how much `quantized` changes each kernel.

    Args:
        model: as in `quantized`.
        tables: as in `quantized`.

    Returns:
        For the path of each kernel, the largest relative error of its outputs: the norm of the change of the weights of
        an output, divided by the norm of these weights.

    Raises:
        ValueError: as in `quantized`.

    >>> {path: round(error, 3) for path, error in quantization_errors(Linear(64, 5, rngs=nnx.Rngs(0))).items()}
    {'kernel': 0.005}
    """
    return {
        ".".join(map(str, (*path, _name(node)))): _error(getattr(node, _name(node))[...], _inputs(node))
        for path, node in _chosen(model, tables).items()
    }


def check_not_quantized(model: nnx.Module, what: str) -> None:
    """Raises ValueError if a model is quantized.

    Args:
        model: the model.
        what: what cannot be done with a quantized model, for the message.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            where = ".".join(map(str, path)) or type(module).__name__
            raise ValueError(f"{where} has int8 weights: a quantized model cannot be {what}")


def _floats(values: Int8[Array, "*shape"], scale: Float[Array, "..."], axis: int) -> Float[Array, "*shape"]:
    return values.astype(scale.dtype) * jnp.expand_dims(scale, axis)


def _name(node: nnx.Module) -> str:
    return "table" if isinstance(node, TokenEmbedding) else "kernel"


def _inputs(node: nnx.Module) -> int:
    """The axis of the inputs; the outputs are those of the parameter rules."""
    return -1 if isinstance(node, TokenEmbedding) else -2


def _error(weights: Array, axis: int) -> float:
    exact = np.asarray(weights).astype(np.float64)
    values, scale = map(np.asarray, to_int8(weights, axis))
    change = values * np.expand_dims(scale.astype(np.float64), axis) - exact
    before = np.linalg.norm(exact, axis=axis)
    return float(np.max(np.linalg.norm(change, axis=axis) / np.where(before == 0, 1, before), initial=0))


def _chosen(model: nnx.Module, tables: bool) -> dict[tuple[Any, ...], nnx.Module]:
    """Returns the modules to quantize by path, after a check of their weights."""
    check_not_quantized(model, "quantized again")
    modules = dict(nnx.iter_modules(model))
    # A small change of a gate may choose another expert.
    gates = {(*path, name) for path, each in modules.items() if isinstance(each, MixtureOfExperts) for name in _GATES}
    # Subclasses may compute something else.
    chosen = {
        path: each
        for path, each in modules.items()
        if path not in gates and (type(each) in (nnx.Linear, Linear) or (tables and type(each) is TokenEmbedding))
    }
    if not chosen:
        raise ValueError(f"{type(model).__name__} must have a linear layer to be quantized")
    for path, each in chosen.items():
        _check(".".join(map(str, (*path, _name(each)))), each)
    return chosen


def _check(name: str, node: Any) -> None:
    weights = getattr(node, _name(node))[...]
    if isinstance(weights, jax.core.Tracer):
        raise ValueError(f"{name} must be concrete to be quantized: call quantized outside of jit")
    if not jnp.isfinite(weights).all():
        raise ValueError(f"{name} must be finite to be quantized")
    if isinstance(node, nnx.Linear):
        options = (node.precision, node.preferred_element_type)
        if options != (None, None) or node.dot_general is not jax.lax.dot_general:
            raise ValueError(f"{name}: a layer with a product of its own cannot be quantized")
