"""Batch normalisation: with the statistics of a batch in training, with running statistics in evaluation."""

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
"""These also match the norms of Flax."""

Model = TypeVar("Model", bound=nnx.Module)


class Statistic(nnx.Param):
    """The kind of variable for statistics, which are measured in training and not learned.

    It is a parameter for saving, restoring, averaging and counting. Its gradient is zero; `move_statistics` updates it.
    """


class Measured(nnx.Intermediate):
    """The kind of variable under which a `BatchNorm` sows its `BatchSums`; see `measurements`."""


@pytree
@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """Mean and variance of each feature.

    Attributes:
        mean: `[D]`, float32 or wider.
        variance: `[D]`, the population variance: divided by the number of elements.
    """

    mean: Array
    variance: Array

    def moved(self, batch: "BatchStatistics", momentum: float = 0.99) -> "BatchStatistics":
        """Returns `momentum * self + (1 - momentum) * batch`, the running statistics after one more batch."""
        return BatchStatistics(
            momentum * self.mean + (1 - momentum) * batch.mean,
            momentum * self.variance + (1 - momentum) * batch.variance,
        )


@pytree
@dataclasses.dataclass(frozen=True)
class BatchSums:
    """Sums that a batch adds to the running statistics of a norm. The sums of several batches can be added.

    They are taken about the running mean. Sums of squares about zero would cancel when the mean is subtracted.

    Attributes:
        count: `[1]`, the number of elements.
        first: `[D]`, the sum of the differences from the running mean.
        second: `[D]`, the sum of the squares of these differences.
    """

    count: Any
    first: Any
    second: Any


class BatchNorm(nnx.Module):
    """Batch normalisation with padding (Ioffe 2015, algorithm 1).

    Each feature gets mean 0 and variance 1 over the batch, then a trained scale and shift. Evaluation uses running
    statistics (algorithm 2, without its factor m / (m - 1) on the variance, as in Flax). A call does not change the
    module: `measurements` collects the sums of a call, and `move_statistics` returns a model with updated statistics.
    Padding does not count.

    Args:
        dim: D, the number of features.
        epsilon: added to the variance.
        momentum: fraction of the running statistics kept at each update, in [0, 1).
        param_dtype: dtype of scale and shift. Statistics are float32 or wider.
        rngs: accepted as in every module; nothing is random. Scale starts at 1, shift at 0, the running mean at 0 and
            the running variance at 1.

    Raises:
        ValueError: `dim` is below 1, `epsilon` is negative or not finite, or `momentum` is not in [0, 1).

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
        """The running statistics for evaluation, without gradients."""
        return BatchStatistics(lax.stop_gradient(self.mean[...]), lax.stop_gradient(self.variance[...]))

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        real: Bool[Array, "*batch"],
        *,
        statistics: BatchStatistics | None = None,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, "*batch D"], BatchStatistics]:
        """Normalises `x`.

        Args:
            x: `[*batch, D]`. Padding may hold any values.
            real: `[*batch]`, True for elements that are not padding.
            statistics: statistics to normalise with. If None, those of this batch; a batch without elements has mean
                and variance 0.
            axis_name: mapped axis of devices over which to combine batches into one, as in `jax.lax.psum`.

        Returns:
            The normalised `[*batch, D]`, with zeros for padding, and the statistics used.
        """
        high = accumulator(x.dtype)
        present = jnp.broadcast_to(real[..., None], x.shape)
        # Padding may hold NaN, and 0 times NaN is NaN in sums and gradients.
        clean = jnp.where(present, x, jnp.zeros_like(x)).astype(high)
        if statistics is None:
            batch = statistics = _measure(clean, present, axis_name)
            tell(self, Measured, lambda: self._sums(batch, _total(real[..., None].astype(high), axis_name)))
        else:
            # Tells a call that measured nothing from one that could not report.
            tell(self, Measured, self._no_sums)
        one = (1,) * (x.ndim - 1)
        mean, variance, scale, shift = (
            each.astype(high).reshape(*one, -1)
            for each in (statistics.mean, statistics.variance, self.scale[...], self.shift[...])
        )
        y = (clean - mean) * lax.rsqrt(variance + jnp.asarray(self.epsilon, high)) * scale + shift
        return jnp.where(present, y, jnp.zeros_like(y)).astype(x.dtype), statistics

    def _sums(self, batch: BatchStatistics, count: Array) -> BatchSums:
        """Turns the statistics of a batch into sums about the running mean, which add up without cancellation."""
        running = self.running.mean
        away = batch.mean.astype(running.dtype) - running
        count = count.astype(running.dtype)
        return BatchSums(count, count * away, count * (batch.variance.astype(running.dtype) + away**2))

    def _no_sums(self) -> BatchSums:
        zero = jnp.zeros_like(self.mean[...])
        return BatchSums(zero[:1], zero, zero)

    def _moved(self, sums: BatchSums) -> BatchStatistics:
        """Returns the running statistics after a batch with these sums."""
        running, count = self.running, jnp.maximum(sums.count, 1)
        away = sums.first / count
        # Var = E[(x - r)^2] - (mean - r)^2 about the running mean r. Rounding may make it slightly negative.
        variance = jnp.maximum(sums.second / count - away**2, 0)
        moved = running.moved(BatchStatistics(running.mean + away, variance), self.momentum)
        # Without elements the statistics stay the same, bit for bit.
        return jax.tree.map(lambda new, old: jnp.where(sums.count > 0, new, old), moved, running)


def measurements(
    call: Callable[..., Output], model: nnx.Module, *args: Any, **kwargs: Any
) -> tuple[Output, list[BatchSums]]:
    """Runs `call(model, *args, **kwargs)` and collects the sums that each batch norm measured.

    A norm that ran several times adds its sums. A norm that did not run, or ran with given statistics, has a count of
    0. As with `routings`, `call` gets a copy of the model, and a norm that is an argument of `jax.jit` or
    `jax.checkpoint` inside `call` does not report.

    Args:
        call: the function to run.
        model: the model whose batch norms report.
        *args: further arguments of `call`.
        **kwargs: further arguments of `call`.

    Returns:
        The output of `call`, and one `BatchSums` per batch norm, in the order of their paths in the model.

    Raises:
        ValueError: the model has batch norms and none reported.

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
    """Extracts from sown values the sums of a model's batch norms; see `measurements`."""
    told = dict(nnx.to_flat_state(sown))
    found = []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            sums = module._no_sums()
            for each in told[(*path, "told")].get_value() if (*path, "told") in told else ():
                sums = jax.tree.map(jnp.add, sums, each)
            found.append(sums)
    if found and not told:
        raise ValueError(
            f"none of the {len(found)} batch norms gave its sums: none was called, or the called ones were copies, as "
            "inside jax.jit(call)(model) or jax.checkpoint(call)(model)"
        )
    return found


def move_statistics(model: Model, sums: Sequence[BatchSums]) -> Model:
    """Returns a copy of a model with the running statistics of its batch norms updated.

    Args:
        model: the model. It does not change.
        sums: the sums of `measurements`, one per batch norm.

    Raises:
        ValueError: the number of sums is not the number of batch norms.
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
    """Mean and population variance of present elements, over all axes but the last. Other elements of `x` are 0."""
    count = jnp.maximum(_total(present.astype(x.dtype), axis_name), 1)
    mean = _total(x, axis_name) / count
    # Two passes: E[x^2] - E[x]^2 would cancel if the mean is large.
    away = jnp.where(present, x - mean.reshape((1,) * (x.ndim - 1) + mean.shape), jnp.zeros_like(x))
    return BatchStatistics(mean, _total(away**2, axis_name) / count)


def _total(x: Float[Array, "*batch D"], axis_name: str | None) -> Float[Array, " D"]:
    summed = jnp.sum(x, axis=tuple(range(x.ndim - 1)))
    return summed if axis_name is None else lax.psum(summed, axis_name)
