"""Initializers for the matrices of any model. Norms and biases keep the values that the model gave them."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import variance_scaling
from jaxtyping import Array

from seqattn.checks import check_number
from seqattn.models.parameter_rules import rule_of
from seqattn.nn import MemoryCompressedAttention
from seqattn.nn.initializers import normal
from train.update.parameters import matrices, paths

Distribution = Literal["normal", "uniform"]
"""The shape of a distribution; the initializer sets its variance."""
Fan = Literal["fan_in", "fan_out"]
"""`fan_in`: the number of inputs of one output; `fan_out`: the number of outputs of one input."""
Model = TypeVar("Model", bound=nnx.Module)


class Initializer(Protocol):
    """The interface of initializers: frozen dataclasses of settings that draw a matrix."""

    def draw(self, key: Array, shape: tuple[int, ...], stack: Sequence[int]) -> Array:
        """Draws an array of random weights.

        Args:
            key: a JAX random key.
            shape: `[..., in, out]`.
            stack: the leading axes that count independent matrices. The other leading axes are the window of a
                convolution, which counts in both fans.

        Returns:
            A float32 array of this shape.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform in [-scale, scale), whatever the size of the matrix (Sutskever 2014, section 3.4, uses 0.08)."""

    scale: float = 0.08
    """Largest absolute weight."""

    def __post_init__(self) -> None:
        check_number("scale", self.scale, above=0)

    def draw(self, key: Array, shape: tuple[int, ...], stack: Sequence[int]) -> Array:
        """Draws an array of this shape."""
        del stack
        return jax.random.uniform(key, shape, minval=-self.scale, maxval=self.scale)


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal with mean 0, whatever the size of the matrix (Devlin 2019 and Radford 2019 use 0.02)."""

    stddev: float = 0.02
    """Standard deviation."""

    def __post_init__(self) -> None:
        check_number("stddev", self.stddev, above=0)

    def draw(self, key: Array, shape: tuple[int, ...], stack: Sequence[int]) -> Array:
        """Draws an array of this shape."""
        del stack
        return normal(self.stddev)(key, shape)


@dataclasses.dataclass(frozen=True)
class Xavier:
    """Variance `2 gain**2 / (fan_in + fan_out)`: a compromise of forward and backward pass (Glorot 2010, eq. 12)."""

    distribution: Distribution = "uniform"
    """Distribution of the weights: normal or uniform."""
    gain: float = 1.0
    """Factor that multiplies every weight."""

    def __post_init__(self) -> None:
        _check_one_of("distribution", self.distribution, Distribution)
        check_number("gain", self.gain, above=0)

    def draw(self, key: Array, shape: tuple[int, ...], stack: Sequence[int]) -> Array:
        """Draws an array of this shape."""
        return _scaled(key, shape, stack, self.gain**2, "fan_avg", self.distribution)


@dataclasses.dataclass(frozen=True)
class Kaiming:
    """Variance `gain**2 / fan`: keeps the variance through layers with ReLU (He 2015, equations 10 and 14)."""

    distribution: Distribution = "normal"
    """Distribution of the weights: normal or uniform."""
    mode: Fan = "fan_in"
    """Pass whose variance is kept: fan_in for the forward pass, fan_out for the backward pass."""
    gain: float = math.sqrt(2)
    """Factor that multiplies every weight; the square root of 2 is for ReLU."""

    def __post_init__(self) -> None:
        _check_one_of("distribution", self.distribution, Distribution)
        _check_one_of("mode", self.mode, Fan)
        check_number("gain", self.gain, above=0)

    def draw(self, key: Array, shape: tuple[int, ...], stack: Sequence[int]) -> Array:
        """Draws an array of this shape."""
        return _scaled(key, shape, stack, self.gain**2, self.mode, self.distribution)


def redraw(model: Model, initializer: Initializer, *, seed: int) -> Model:
    """Returns a copy of a model with all matrices redrawn. Vectors and matrices of zeros keep their values.

    The weights depend only on seed, path and shape, so that an additional layer does not change the other layers. The
    axes of a matrix decide its fans:

    - A kernel is `[in, out]`, as in `jax.nn.initializers`.
    - The kernel of a flax convolution is `[*window, in, out]`. Its fans include the window.
    - The filters of memory-compressed attention are `[stride, heads, in, out]`, with the window `stride` and one matrix
      for each head.
    - An embedding `[V, D]` is `[out, in]`, as if its rows made logits, whether tied or not. So are relative keys and
      the score matrices of a recurrent model. Their fan in is the size of a vector.
    - Any other array with more axes is a stack of matrices, such as the weights of experts `[E, D, F]`.

    Args:
        model: an `nnx.Module`; it is not changed. Only modules, not their states, tell which kernels are convolutions.
        initializer: draws each matrix. Matrices keep their dtypes.
        seed: any integer.

    Returns:
        A model of the same type and structure.

    >>> layer = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    >>> redraw(layer, Uniform(0.08), seed=0).kernel.shape
    (3, 5)
    """
    stacks = _stacks(model)
    graph, params, *others = nnx.split(model, nnx.Param, ...)

    def anew(value: Array, name: str, is_matrix: bool) -> Array:
        if not is_matrix:
            return value
        # Without a known window every leading axis counts matrices, as for the weights of experts.
        stack, rows = stacks.get(name, range(value.ndim - 2)), _rows(name, value.ndim)
        shape = value.shape if rows is None else (*value.shape[:rows], *value.shape[rows + 1 :], value.shape[rows])
        # Drawn as [..., in, out], where initializers expect the fans; the axis of outputs moves back afterwards.
        matrix = initializer.draw(_key(seed, name), shape, stack)
        matrix = (matrix if rows is None else jnp.moveaxis(matrix, -1, rows)).astype(value.dtype)
        # A layer that starts at zero is meant to have no effect at first, such as the noise of a gate.
        return jnp.where(value.any(), matrix, value)

    drawn = jax.tree.map(anew, params, paths(params), matrices(params))
    return nnx.merge(graph, drawn, *others)


def _stacks(model: nnx.Module) -> dict[str, Sequence[int]]:
    """The axes that count independent matrices, by the path of each array with a window."""
    found: dict[str, Sequence[int]] = {}
    for path, module in nnx.iter_modules(model):
        # The shape alone does not tell a window from a stack, so the modules are asked.
        if isinstance(module, nnx.Conv | nnx.ConvTranspose):
            found["/".join([*map(str, path), "kernel"])] = range(module.kernel[...].ndim - 2 - len(module.kernel_size))
        elif isinstance(module, MemoryCompressedAttention):
            heads = 1
            found |= {"/".join([*map(str, path), name]): (heads,) for name in ("key_filter", "value_filter")}
    return found


def _rows(name: str, ndim: int) -> int | None:
    """The axis of outputs if it is not the last one: 1 for relative keys `[layers, distances, (heads,) H]`."""
    rule = rule_of(name)
    # Without a rule the layout is that of flax, where outputs come last.
    return None if rule is None or rule.outputs == -1 else rule.outputs % ndim


def _key(seed: int, path: str) -> Array:
    # A checksum, since Python's hash of a string differs from process to process.
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))


def _scaled(
    key: Array,
    shape: tuple[int, ...],
    stack: Sequence[int],
    scale: float,
    mode: Fan | Literal["fan_avg"],
    distribution: Distribution,
) -> Array:
    """Draws with variance `scale` divided by a fan; see `Initializer.draw`."""
    if distribution == "uniform":
        return variance_scaling(scale, mode, distribution, batch_axis=stack)(key, shape)
    # `variance_scaling` gives other bits under `jax.jit` here; see `seqattn.nn.initializers.normal`.
    window = math.prod(size for axis, size in enumerate(shape[:-2]) if axis not in stack)
    fans = {"fan_in": window * shape[-2], "fan_out": window * shape[-1]}
    fan = sum(fans.values()) / 2 if mode == "fan_avg" else fans[mode]
    return normal(math.sqrt(scale / fan))(key, shape)


def _check_one_of(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} ({value}) must be one of {', '.join(get_args(choices))}")
