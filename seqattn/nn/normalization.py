"""Batch normalisation as a pure function of a batch, or of statistics that were gathered from batches before."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from seqattn.checks import check_number, check_sizes
from seqattn.nn.parameter_rule import Kind, ParameterRule
from seqattn.precision import accumulator
from seqattn.pytrees import pytree

RULES = (ParameterRule("*scale", Kind.VECTOR), ParameterRule("*shift", Kind.VECTOR))
"""Those of flax's norms, too."""


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


class BatchNorm(nnx.Module):
    """Each feature with mean 0 and variance 1 over the batch, then scaled and shifted (Ioffe 2015, algorithm 1).

    The module keeps no running statistics: a call gives back those of its batch, and takes those that evaluation is to
    use (algorithm 2, but for its factor m / (m - 1) of the variance of m elements, as in Flax). Padding counts for
    nothing.

    Args:
        dim: D, the number of features.
        epsilon: added to the variance.
        param_dtype: dtype of scale and shift.
        rngs: as every module takes them; scale starts at 1 and shift at 0.

    Raises:
        ValueError: `dim` is below 1, or `epsilon` negative or not finite.

    >>> norm, x = BatchNorm(2, rngs=nnx.Rngs(0)), jnp.array([[1.0, 0.0], [3.0, 4.0], [jnp.nan, 7.0]])
    >>> y, statistics = norm(x, jnp.array([True, True, False]))
    >>> print(y[:2].round(2), statistics.mean)
    [[-1. -1.]
     [ 1.  1.]] [2. 2.]
    >>> evaluated, _ = norm(x, jnp.array([True, True, False]), statistics=statistics)
    """

    def __init__(
        self, dim: int, *, epsilon: float = 1e-5, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        check_sizes(dim=dim)
        check_number("epsilon", epsilon, minimum=0)
        self.epsilon = epsilon
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (dim,), param_dtype))
        self.shift = nnx.Param(nnx.initializers.zeros(rngs.params(), (dim,), param_dtype))

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
            statistics = _measure(clean, present, axis_name)
        one = (1,) * (x.ndim - 1)
        mean, variance, scale, shift = (
            each.astype(high).reshape(*one, -1)
            for each in (statistics.mean, statistics.variance, self.scale[...], self.shift[...])
        )
        y = (clean - mean) * lax.rsqrt(variance + jnp.asarray(self.epsilon, high)) * scale + shift
        return jnp.where(present, y, jnp.zeros_like(y)).astype(x.dtype), statistics


def _measure(x: Float[Array, "*batch D"], present: Array, axis_name: str | None) -> BatchStatistics:
    """Mean and variance over all but the last axis of what is present; the rest of `x` is zero."""
    axes = tuple(range(x.ndim - 1))

    def total(values: Array) -> Array:
        summed = jnp.sum(values, axis=axes)
        return summed if axis_name is None else lax.psum(summed, axis_name)

    count = jnp.maximum(total(present.astype(x.dtype)), 1)
    mean = total(x) / count
    # About the mean, since the mean of squares less the square of the mean cancels.
    away = jnp.where(present, x - mean.reshape((1,) * (x.ndim - 1) + mean.shape), jnp.zeros_like(x))
    return BatchStatistics(mean, total(away**2) / count)
