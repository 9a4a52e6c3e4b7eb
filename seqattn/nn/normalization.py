"""Batch normalisation: by the statistics of a batch in training, by running ones in evaluation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from seqattn.checks import check_number, check_sizes
from seqattn.nn.capture import Output, captured, tell
from seqattn.nn.parameter_rule import Kind, ParameterRule
from seqattn.precision import accumulator
from seqattn.pytrees import pytree

RULES = (
    ParameterRule("*scale", Kind.VECTOR),
    ParameterRule("*shift", Kind.VECTOR),
    ParameterRule("*norms/*/mean", Kind.STATISTIC),
    ParameterRule("*norms/*/variance", Kind.STATISTIC),
)
"""Those of flax's norms, too."""

Model = TypeVar("Model", bound=nnx.Module)


class Statistic(nnx.Param):
    """The kind of variable for what is measured in training, not learned.

    It is a parameter wherever parameters are saved, restored, averaged or counted. Its gradient is zero;
    `move_statistics` moves it.
    """


class Measured(nnx.Intermediate):
    """The kind of variable as which a `BatchNorm` sows its `BatchSums`: see `measurements`."""


@pytree
@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """Mean and variance of each feature.

    Attributes:
        mean: `[D]`, float32 at least.
        variance: `[D]`, of a whole population: divided by the number of elements.
    """

    mean: Array
    variance: Array

    def moved(self, batch: "BatchStatistics", momentum: float = 0.99) -> "BatchStatistics":
        """These running statistics after another batch: `momentum` of the old, the rest of the new ones."""
        return BatchStatistics(
            momentum * self.mean + (1 - momentum) * batch.mean,
            momentum * self.variance + (1 - momentum) * batch.variance,
        )


@pytree
@dataclasses.dataclass(frozen=True)
class BatchSums:
    """What a batch adds to the running statistics of a norm; those of several batches may be added up.

    They are about the running mean, since the mean of squares less the square of the mean cancels.

    Attributes:
        count: how many elements, `[1]`.
        first: the sum of their distances from the running mean, `[D]`.
        second: the sum of the squares of these, `[D]`.
    """

    count: Any
    first: Any
    second: Any


class BatchNorm(nnx.Module):
    """Each feature with mean 0 and variance 1 over the batch, then scaled and shifted (Ioffe 2015, algorithm 1).

    Evaluation uses running statistics (algorithm 2, but for its factor m / (m - 1) of the variance of m elements, as in
    Flax). A call changes nothing: `measurements` gives what it measured, and `move_statistics` a model that has moved.
    Padding counts for nothing.

    Args:
        dim: D, the number of features.
        epsilon: added to the variance.
        momentum: how much stays of the running statistics at each move.
        param_dtype: dtype of scale and shift; statistics are float32 at least.
        rngs: as every module takes them; scale starts at 1 and shift at 0, running mean at 0 and variance at 1.

    Raises:
        ValueError: `dim` is below 1, `epsilon` negative or not finite, or `momentum` not in [0, 1).

    >>> norm, x = BatchNorm(2, rngs=nnx.Rngs(0)), jnp.array([[1.0, 0.0], [3.0, 4.0], [jnp.nan, 7.0]])
    >>> real = jnp.array([True, True, False])
    >>> y, statistics = norm(x, real)
    >>> print(y[:2].round(2), statistics.mean)
    [[-1. -1.]
     [ 1.  1.]] [2. 2.]
    >>> evaluated, _ = norm(x, real, statistics=norm.running)
    >>> print(evaluated[:2].round(2))
    [[1. 0.]
     [3. 4.]]
    """

    def __init__(
        self,
        dim: int,
        *,
        epsilon: float = 1e-5,
        momentum: float = 0.99,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(dim=dim)
        check_number("epsilon", epsilon, minimum=0)
        check_number("momentum", momentum, minimum=0, below=1)
        self.epsilon, self.momentum = epsilon, momentum
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (dim,), param_dtype))
        self.shift = nnx.Param(nnx.initializers.zeros(rngs.params(), (dim,), param_dtype))
        self.mean = Statistic(jnp.zeros(dim, accumulator(param_dtype)))
        self.variance = Statistic(jnp.ones(dim, accumulator(param_dtype)))

    @property
    def running(self) -> BatchStatistics:
        """The running statistics, by which evaluation normalises; no gradient reaches them."""
        return BatchStatistics(lax.stop_gradient(self.mean[...]), lax.stop_gradient(self.variance[...]))

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        real: Bool[Array, "*batch"],
        *,
        statistics: BatchStatistics | None = None,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, "*batch D"], BatchStatistics]:
        """`x` normalised, zeros where it is not real; and the statistics used.

        Args:
            x: `[*batch, D]`; what is not real may hold anything.
            real: `[*batch]`, True for elements that count.
            statistics: to normalise by; None for those of this batch. A batch without elements has mean and variance 0.
            axis_name: of a mapped axis of devices whose batches are to count as one.
        """
        high = accumulator(x.dtype)
        present = jnp.broadcast_to(real[..., None], x.shape)
        clean = jnp.where(present, x, jnp.zeros_like(x)).astype(high)
        if statistics is None:
            batch = statistics = _measure(clean, present, axis_name)
            tell(self, Measured, lambda: self._sums(batch, _total(real[..., None].astype(high), axis_name)))
        one = (1,) * (x.ndim - 1)
        mean, variance, scale, shift = (
            each.astype(high).reshape(*one, -1)
            for each in (statistics.mean, statistics.variance, self.scale[...], self.shift[...])
        )
        y = (clean - mean) * lax.rsqrt(variance + jnp.asarray(self.epsilon, high)) * scale + shift
        return jnp.where(present, y, jnp.zeros_like(y)).astype(x.dtype), statistics

    def _sums(self, batch: BatchStatistics, count: Array) -> BatchSums:
        running = self.running.mean
        away = batch.mean.astype(running.dtype) - running
        count = count.astype(running.dtype)
        return BatchSums(count, count * away, count * (batch.variance.astype(running.dtype) + away**2))

    def _moved(self, sums: BatchSums) -> BatchStatistics:
        running, count = self.running, jnp.maximum(sums.count, 1)
        away = sums.first / count
        variance = jnp.maximum(sums.second / count - away**2, 0)
        moved = running.moved(BatchStatistics(running.mean + away, variance), self.momentum)
        # Without elements they stay, bit by bit.
        return jax.tree.map(lambda new, old: jnp.where(sums.count > 0, new, old), moved, running)


def measurements(
    call: Callable[..., Output], model: nnx.Module, *args: Any, **kwargs: Any
) -> tuple[Output, list[BatchSums]]:
    """`call(model, *args, **kwargs)`, and what each batch norm of the model measured inside it, in their order.

    A norm that was called several times adds up what it measured; one that was not called, or with given statistics,
    has a count of 0. As with `routings`, `call` gets a copy of the model.

    >>> norm = BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
    >>> train = lambda norm, x: norm(x, jnp.ones(len(x), bool))[0]
    >>> _, sums = measurements(train, norm, jnp.array([[2.0], [6.0]]))
    >>> moved = move_statistics(norm, sums)
    >>> print(moved.mean[...], moved.variance[...])  # halfway from 0 and 1 to 4 and 4
    [2.] [2.5]
    """
    output, (sown,) = captured(call, [Measured], model, *args, **kwargs)
    return output, measurements_among(sown, model)


def measurements_among(sown: Any, model: nnx.Module) -> list[BatchSums]:
    """The sums that the batch norms of a model sowed; see `measurements`."""
    told = dict(nnx.to_flat_state(sown))
    found = []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            zero = jnp.zeros_like(module.mean[...])
            sums = BatchSums(zero[:1], zero, zero)
            for each in told[(*path, "told")].get_value() if (*path, "told") in told else ():
                sums = jax.tree.map(jnp.add, sums, each)
            found.append(sums)
    return found


def move_statistics(model: Model, sums: Sequence[BatchSums]) -> Model:
    """A copy of a model whose batch norms have moved their running statistics towards what `measurements` gave.

    Raises:
        ValueError: there are not as many sums as norms.
    """
    copy = jax.tree.map(lambda leaf: leaf, model)
    norms = [module for _, module in nnx.iter_modules(copy) if isinstance(module, BatchNorm)]
    if len(sums) != len(norms):
        raise ValueError(f"{len(sums)} sums were given for the {len(norms)} batch norms of the model")
    for norm, each in zip(norms, sums, strict=True):
        moved = norm._moved(each)
        norm.mean[...], norm.variance[...] = moved.mean, moved.variance
    return copy


def _measure(x: Float[Array, "*batch D"], present: Array, axis_name: str | None) -> BatchStatistics:
    """Mean and variance over all but the last axis of what is present; the rest of `x` is zero."""
    count = jnp.maximum(_total(present.astype(x.dtype), axis_name), 1)
    mean = _total(x, axis_name) / count
    # About the mean, since the mean of squares less the square of the mean cancels.
    away = jnp.where(present, x - mean.reshape((1,) * (x.ndim - 1) + mean.shape), jnp.zeros_like(x))
    return BatchStatistics(mean, _total(away**2, axis_name) / count)


def _total(x: Float[Array, "*batch D"], axis_name: str | None) -> Float[Array, " D"]:
    summed = jnp.sum(x, axis=tuple(range(x.ndim - 1)))
    return summed if axis_name is None else lax.psum(summed, axis_name)
