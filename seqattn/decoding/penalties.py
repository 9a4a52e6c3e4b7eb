"""How sequences of different lengths, and of different coverage of the source, are compared."""

import abc
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqattn.decoding.processors import Number, check_range
from seqattn.static import pytree


class LengthPenalty(abc.ABC):
    """The score of a sequence, from its log probability and its length; the higher the better.

    Base your own on this class: a frozen dataclass that is a pytree. More log probability must never lower the score.
    """

    @abc.abstractmethod
    def __call__(self, log_probability: Float[Array, "*B"], length: Int[Array, "*#B"]) -> Float[Array, "*B"]:
        """The score; `length` counts the end token."""

    def bound(self, log_probability: Float[Array, "*B"], length: Int[Array, ""], max_length: int) -> Float[Array, "*B"]:
        """The best score that can still come of a sequence of `length` tokens: with certainty from here, at any end.

        >>> print(AverageLength(1.0).bound(jnp.array([-6.0]), jnp.array(2), max_length=12))
        [-0.5]
        >>> print(AverageLength(-1.0).bound(jnp.array([-6.0]), jnp.array(2), max_length=12))
        [-18.]
        """
        lengths = jnp.arange(1, max_length + 1).reshape((1,) * log_probability.ndim + (-1,))
        certain = jnp.broadcast_to(log_probability[..., None], (*log_probability.shape, max_length))
        return jnp.max(jnp.where(lengths > length, self(certain, lengths), -jnp.inf), axis=-1)


@pytree
@dataclasses.dataclass(frozen=True)
class NoPenalty(LengthPenalty):
    """The log probability itself: favours short sequences."""

    def __call__(self, log_probability: Float[Array, "*B"], length: Int[Array, "*#B"]) -> Float[Array, "*B"]:
        return log_probability


@pytree
@dataclasses.dataclass(frozen=True)
class AverageLength(LengthPenalty):
    """`log_probability / length ** power`: Hugging Face's `length_penalty`; with power 1 the mean of the tokens.

    Attributes:
        power: above 0 favours long sequences, below 0 short ones, 0 changes nothing; a leaf.

    >>> print(AverageLength(0.5)(jnp.array([-6.0, -6.0]), jnp.array([4, 9])))
    [-3. -2.]
    """

    power: Number = 1.0

    def __post_init__(self) -> None:
        check_range("power", self.power)

    def __call__(self, log_probability: Float[Array, "*B"], length: Int[Array, "*#B"]) -> Float[Array, "*B"]:
        return log_probability / _power(length.astype(jnp.float32), self.power)


@pytree
@dataclasses.dataclass(frozen=True)
class GNMT(LengthPenalty):
    """`log_probability / ((5 + length) / 6) ** alpha` (Wu 2016, equation 14).

    Attributes:
        alpha: 0.6 to 0.7 in the paper; 0 changes nothing; a leaf.

    >>> print(GNMT(1.0)(jnp.array([-6.0, -6.0]), jnp.array([1, 7])))
    [-6. -3.]
    """

    alpha: Number = 0.6

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha)

    def __call__(self, log_probability: Float[Array, "*B"], length: Int[Array, "*#B"]) -> Float[Array, "*B"]:
        return log_probability / _power((5 + length.astype(jnp.float32)) / 6, self.alpha)


@pytree
@dataclasses.dataclass(frozen=True)
class CoveragePenalty:
    """`beta * sum over i of log(min(attention given to i in all steps, 1))` (Wu 2016, equation 14), added to the score.

    It is never above 0 and lowers sequences that left a part of the source unread. What was given no attention at all
    counts as float32's smallest normal number, so that two such sequences can still be compared.

    Attributes:
        beta: at least 0, 0.2 in the paper; a leaf.
        present: where the source has tokens `[B, S]`; padding is to be left out of the sum. None: everywhere; a leaf.

    >>> print(CoveragePenalty(beta=2.0)(jnp.array([[[0.5, 1.5], [1.0, 1.0]]])))
    [[-1.3862944  0.       ]]
    """

    beta: Number = 0.2
    present: Bool[Array, "B S"] | None = None

    def __post_init__(self) -> None:
        check_range("beta", self.beta, minimum=0)

    def __call__(self, coverage: Float[Array, "B beams S"]) -> Float[Array, "B beams"]:
        read = jnp.log(jnp.clip(coverage, jnp.finfo(coverage.dtype).tiny, 1.0))
        if self.present is not None:
            read = jnp.where(self.present[:, None], read, 0.0)
        return scalar(self.beta) * read.sum(axis=-1)


def _power(length: Float[Array, "*B"], power: Number) -> Float[Array, "*B"]:
    return length ** scalar(power).reshape((1,) * length.ndim)


def scalar(value: Number) -> Float[Array, ""]:
    """One number for all rows; ValueError where it is an array of more: hypotheses of all rows compete alike."""
    if jnp.ndim(value):
        raise ValueError(f"give one number for all rows, got the shape {jnp.shape(value)}")
    return jnp.asarray(value, jnp.float32)
