"""Initial weights drawn anew, for any model: matrices by one rule, norms and biases as the model made them."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, variance_scaling
from jaxtyping import Array

from seqattn.checks import check_number
from seqattn.models.parameter_rules import rule_of
from seqattn.nn import MemoryCompressedAttention
from train.update.parameters import matrices, paths

Distribution = Literal["normal", "uniform"]
"""The shape of a distribution; its variance comes from elsewhere."""
Fan = Literal["fan_in", "fan_out"]
"""What one output of a matrix is summed from, or what one input goes into."""
Model = TypeVar("Model", bound=nnx.Module)


class Initializer(Protocol):
    """A frozen dataclass of settings that can draw a matrix."""

    def draw(self, key: Array, shape: tuple[int, ...], stack: Sequence[int]) -> Array:
        """An array `[..., in, out]` whose axes `stack` count arrays of their own, and whose others are a window."""
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform in [-scale, scale), whatever the size of the matrix (Sutskever 2014 has 0.08)."""

    scale: float = 0.08
    """Largest weight."""

    def __post_init__(self) -> None:
        check_number("scale", self.scale, above=0)

    def draw(self, key: Array, shape: tuple[int, ...], stack: Sequence[int]) -> Array:
        """An array of this shape."""
        del stack
        return jax.random.uniform(key, shape, minval=-self.scale, maxval=self.scale)


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal with mean 0, whatever the size of the matrix (Devlin 2019 and Radford 2019 have 0.02)."""

    stddev: float = 0.02
    """Standard deviation."""

    def __post_init__(self) -> None:
        check_number("stddev", self.stddev, above=0)

    def draw(self, key: Array, shape: tuple[int, ...], stack: Sequence[int]) -> Array:
        """An array of this shape."""
        del stack
        return normal(self.stddev)(key, shape)


@dataclasses.dataclass(frozen=True)
class Xavier:
    """Variance `2 gain**2 / (fan_in + fan_out)`: for the forward and the backward pass alike (Glorot 2010, eq. 12)."""

    distribution: Distribution = "uniform"
    """Of the weights: normal, or uniform."""
    gain: float = 1.0
    """Multiplies every weight."""

    def __post_init__(self) -> None:
        _check_one_of("distribution", self.distribution, Distribution)
        check_number("gain", self.gain, above=0)

    def draw(self, key: Array, shape: tuple[int, ...], stack: Sequence[int]) -> Array:
        """An array of this shape."""
        return variance_scaling(self.gain**2, "fan_avg", self.distribution, batch_axis=stack)(key, shape)


@dataclasses.dataclass(frozen=True)
class Kaiming:
    """Variance `gain**2 / fan`: what a ReLU takes away is given back (He 2015, equations 10 and 14)."""

    distribution: Distribution = "normal"
    """Of the weights: normal, or uniform."""
    mode: Fan = "fan_in"
    """Which pass keeps its variance: fan_in the forward one, fan_out the backward one."""
    gain: float = math.sqrt(2)
    """Multiplies every weight; the root of 2 is that of a ReLU."""

    def __post_init__(self) -> None:
        _check_one_of("distribution", self.distribution, Distribution)
        _check_one_of("mode", self.mode, Fan)
        check_number("gain", self.gain, above=0)

    def draw(self, key: Array, shape: tuple[int, ...], stack: Sequence[int]) -> Array:
        """An array of this shape."""
        return variance_scaling(self.gain**2, self.mode, self.distribution, batch_axis=stack)(key, shape)


def redraw(model: Model, initializer: Initializer, *, seed: int) -> Model:
    """A copy of a model with every matrix drawn anew; norms, biases, other vectors, and what begins as zeros stay.

    What is drawn is a function of seed, path and shape alone: a layer more changes no other layer. A matrix is
    `[in, out]`, as jax.nn.initializers has it. The kernel of a flax convolution is `[*window, in, out]`, and its fans
    count the window; so do those of the filters of compressed attention, `[stride, heads, in, out]`, which are one for
    each head. A table of vectors `[V, D]` is `[out, in]`, as if its rows made logits, tied or not, and so are relative
    keys and the matrices of a recurrent model's scores: their fan in is the size of a vector. Of any other array of
    more axes, as of the weights of experts `[E, D, F]`, each `[D, F]` is one.

    Args:
        model: an `nnx.Module`, since only the modules say which kernels are convolutions; it is not changed.
        initializer: how a matrix is drawn; it keeps its dtype.
        seed: any integer.

    >>> layer = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    >>> redraw(layer, Uniform(0.08), seed=0).kernel.shape
    (3, 5)
    """
    stacks = _stacks(model)
    graph, params, *others = nnx.split(model, nnx.Param, ...)

    def anew(value: Array, name: str, is_matrix: bool) -> Array:
        # What a model begins with as zeros does nothing at first, and is meant so: the noise of a gate.
        if not is_matrix or not value.any():
            return value
        stack, rows = stacks.get(name, range(value.ndim - 2)), _rows(name, value.ndim)
        shape = value.shape if rows is None else (*value.shape[:rows], *value.shape[rows + 1 :], value.shape[rows])
        matrix = initializer.draw(_key(seed, name), shape, stack)
        return (matrix if rows is None else jnp.moveaxis(matrix, -1, rows)).astype(value.dtype)

    drawn = jax.tree.map(anew, params, paths(params), matrices(params))
    return nnx.merge(graph, drawn, *others)


def _stacks(model: nnx.Module) -> dict[str, Sequence[int]]:
    """By the path of each array that has a window, the axes that count arrays of their own."""
    found: dict[str, Sequence[int]] = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv | nnx.ConvTranspose):
            found["/".join([*map(str, path), "kernel"])] = range(module.kernel[...].ndim - 2 - len(module.kernel_size))
        elif isinstance(module, MemoryCompressedAttention):
            heads = 1
            found |= {"/".join([*map(str, path), name]): (heads,) for name in ("key_filter", "value_filter")}
    return found


def _rows(name: str, ndim: int) -> int | None:
    """The axis that counts outputs where it is not the last: of relative keys `[layers, distances, (heads,) H]` 1."""
    rule = rule_of(name)
    return None if rule is None or rule.outputs == -1 else rule.outputs % ndim


def _key(seed: int, path: str) -> Array:
    # By a checksum, since Python's own hash of a text is another one in every process.
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))


def _check_one_of(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} ({value}) must be one of {', '.join(get_args(choices))}")
