"""How sequences of different lengths, and of different coverage of the source, are compared."""

import abc
import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqattn.checks import check_range
from seqattn.decoding.processors import Number
from seqattn.pytrees import pytree


class LengthPenalty(abc.ABC):
    """The score of a sequence, from its log probability and its length; the higher the better.

    Base your own on this class: a frozen dataclass that is a pytree. More log probability must never lower the score.
    """

    @abc.abstractmethod
    def __call__(self, log_probability: Float[Array, "*B"], length: Int[Array, "*#B"]) -> Float[Array, "*B"]:
        """The score; `length` counts the end token."""

    def bound(
        self,
        log_probability: Float[Array, "*B"],
        length: Int[Array, ""],
        max_length: int,
        *,
        limit: Int[Array, "*#B"] | None = None,
        gain: Float[Array, "*#B"] | float = 0.0,
    ) -> Float[Array, "*B"]:
        """The best score that can still come of a sequence of `length` tokens, whichever its length will be.

        Args:
            log_probability: of the sequence so far.
            length: its tokens so far.
            max_length: most tokens of any sequence.
            limit: most tokens of this one, at most `max_length`, which it is by default.
            gain: the most that a token can add to the log probability, finite. Certain tokens add 0.

        >>> print(AverageLength(1.0).bound(jnp.array([-6.0]), jnp.array(2), max_length=12))
        [-0.5]
        >>> print(AverageLength(-1.0).bound(jnp.array([-6.0]), jnp.array(2), max_length=12))
        [-18.]
        """
        each = (1,) * log_probability.ndim
        lengths = jnp.arange(1, max_length + 1).reshape(*each, max_length)
        gain, last = (
            jnp.broadcast_to(value, log_probability.shape)[..., None]
            for value in (gain, max_length if limit is None else limit)
        )
        highest = log_probability[..., None] + gain * (lengths - length).astype(log_probability.dtype)
        is_possible = (lengths > length) & (lengths <= last)
        return jnp.max(jnp.where(is_possible, self(highest, lengths), -jnp.inf), axis=-1)


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
        present: where the source has tokens, a bool array `[B, S]`; or `True`, where no source of the batch is padded;
            a leaf. There is no default: padding is never read, so to count it would lower all scores of a row by how
            far it is padded.

    Raises:
        TypeError: when it is called, `present` is not bool.
        ValueError: when it is called, `present` is missing, or has another shape than the source.

    >>> coverage = jnp.array([[[0.5, 1.5, 0.0], [1.0, 1.0, 0.0]]])
    >>> print(CoveragePenalty(beta=2.0, present=jnp.array([[True, True, False]]))(coverage))
    [[-1.3862944  0.       ]]
    """

    beta: Number = 0.2
    present: Bool[Array, "..."] | Bool[np.ndarray, "..."] | bool | None = None

    def __post_init__(self) -> None:
        check_range("beta", self.beta, minimum=0)

    def __call__(self, coverage: Float[Array, "B beams S"]) -> Float[Array, "B beams"]:
        read = jnp.log(jnp.clip(coverage, jnp.finfo(coverage.dtype).tiny, 1.0))
        return scalar(self.beta) * jnp.where(self._present_in(coverage), read, 0.0).sum(axis=-1)

    def _present_in(self, coverage: Float[Array, "B beams S"]) -> Bool[Array, "#B 1 #S"]:
        rows, _, source = coverage.shape
        if self.present is None or self.present is False:
            raise ValueError(
                "a coverage penalty needs `present`, where the source has tokens: padding would count as unread; "
                "present=True says that no source is padded"
            )
        present = jnp.asarray(self.present)
        if present.dtype != jnp.bool_:
            raise TypeError(f"present must be bool, got {present.dtype}")
        if present.ndim == 0:
            return present.reshape(1, 1, 1)
        if present.shape != (rows, source):
            raise ValueError(f"present must be [B, S], {(rows, source)}, as the alignment is, got {present.shape}")
        return present[:, None]


def _power(length: Float[Array, "*B"], power: Number) -> Float[Array, "*B"]:
    return length ** scalar(power).reshape((1,) * length.ndim)


def scalar(value: Number) -> Float[Array, ""]:
    """One number for all rows; ValueError where it is an array of more: hypotheses of all rows compete alike."""
    if jnp.ndim(value):
        raise ValueError(f"give one number for all rows, got the shape {jnp.shape(value)}")
    return jnp.asarray(value, jnp.float32)
