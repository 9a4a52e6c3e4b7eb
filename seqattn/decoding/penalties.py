"""Length and coverage penalties: how beam search compares sequences of different lengths."""

import abc
import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqattn.checks import check_range
from seqattn.decoding.processors import Number
from seqattn.pytrees import pytree


class LengthPenalty(abc.ABC):
    """Base class of length penalties: computes a score from log probability and length; higher is better.

    A subclass is a frozen dataclass registered with `seqattn.pytrees.pytree`. A higher log probability must never lower
    the score.
    """

    @abc.abstractmethod
    def __call__(self, log_probability: Float[Array, "*B"], length: Int[Array, "*#B"]) -> Float[Array, "*B"]:
        """Returns the score.

        Args:
            log_probability: of the sequence, in nats.
            length: number of tokens including the end token; broadcasts against `log_probability`.
        """

    def bound(
        self,
        log_probability: Float[Array, "*B"],
        length: Int[Array, ""],
        max_length: int,
        *,
        limit: Int[Array, "*#B"] | None = None,
        gain: Float[Array, "*#B"] | float = 0.0,
    ) -> Float[Array, "*B"]:
        """Returns the best score that a sequence of `length` tokens can still reach, over all lengths it may end with.

        Args:
            log_probability: of the sequence so far, in nats.
            length: number of tokens so far.
            max_length: maximum number of tokens of any sequence.
            limit: maximum number of tokens of this sequence, at most `max_length`, which is the default.
            gain: the most that one token can add to the log probability, finite. Defaults to 0, since a token of
                probability 1 adds 0.

        Returns:
            The bound, in the shape of `log_probability`; -inf if no longer sequence is allowed.

        >>> print(AverageLength(1.0).bound(jnp.array([-6.0]), jnp.array(2), max_length=12))
        [-0.5]
        >>> print(AverageLength(-1.0).bound(jnp.array([-6.0]), jnp.array(2), max_length=12))
        [-18.]
        """
        # A penalty need not be monotonic in the length, so every possible final length is scored.
        each = (1,) * log_probability.ndim
        lengths = jnp.arange(1, max_length + 1).reshape(*each, max_length)
        gain, last = (
            jnp.broadcast_to(value, log_probability.shape)[..., None]
            for value in (gain, max_length if limit is None else limit)
        )
        # The best case: each further token adds the most that it can.
        highest = log_probability[..., None] + gain * (lengths - length).astype(log_probability.dtype)
        # A live hypothesis grows by at least one token, so its present length is not a possible final length.
        is_possible = (lengths > length) & (lengths <= last)
        return jnp.max(jnp.where(is_possible, self(highest, lengths), -jnp.inf), axis=-1)


@pytree
@dataclasses.dataclass(frozen=True)
class NoPenalty(LengthPenalty):
    """Scores a sequence by its log probability, which favours short sequences."""

    def __call__(self, log_probability: Float[Array, "*B"], length: Int[Array, "*#B"]) -> Float[Array, "*B"]:
        """Returns `log_probability`."""
        return log_probability


@pytree
@dataclasses.dataclass(frozen=True)
class AverageLength(LengthPenalty):
    """`log_probability / length ** power`: `length_penalty` in Hugging Face. Power 1 is the mean over the tokens.

    Attributes:
        power: above 0 favours long sequences, below 0 short ones, 0 changes nothing; one number; a leaf. Defaults to 1.

    Raises:
        ValueError: `power` is known and not finite; when called, it is not one number.

    >>> print(AverageLength(0.5)(jnp.array([-6.0, -6.0]), jnp.array([4, 9])))
    [-3. -2.]
    """

    power: Number = 1.0

    def __post_init__(self) -> None:
        check_range("power", self.power)

    def __call__(self, log_probability: Float[Array, "*B"], length: Int[Array, "*#B"]) -> Float[Array, "*B"]:
        """Returns the log probability divided by `length ** power`."""
        # Each token lowers the log probability, so undivided sums would favour whatever ends first.
        return log_probability / _power(length.astype(jnp.float32), self.power)


@pytree
@dataclasses.dataclass(frozen=True)
class GNMT(LengthPenalty):
    """`log_probability / ((5 + length) / 6) ** alpha`, the length penalty of GNMT (Wu 2016, equation 14).

    Attributes:
        alpha: the strength, one number, a leaf; 0 changes nothing. Defaults to 0.6.

    Raises:
        ValueError: `alpha` is known and not finite; when called, it is not one number.

    >>> print(GNMT(1.0)(jnp.array([-6.0, -6.0]), jnp.array([1, 7])))
    [-6. -3.]
    """

    alpha: Number = 0.6

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha)

    def __call__(self, log_probability: Float[Array, "*B"], length: Int[Array, "*#B"]) -> Float[Array, "*B"]:
        """Returns the log probability divided by the paper's `lp(Y)`."""
        # The offset of 5 keeps the reward for one more token small while sequences are short.
        return log_probability / _power((5 + length.astype(jnp.float32)) / 6, self.alpha)


@pytree
@dataclasses.dataclass(frozen=True)
class CoveragePenalty:
    """The coverage penalty of GNMT, added to the score (Wu 2016, equation 14).

    Computes `beta * sum over i of log(min(c_i, 1))`, where `c_i` is the attention that source token i received over all
    steps. The penalty is at most 0 and lowers the score of sequences that left part of the source unread. A token
    without any attention counts as float32's smallest normal number, so that two such sequences remain comparable.

    Attributes:
        beta: at least 0, 0.2 in the paper; one number; a leaf. Defaults to 0.2.
        present: marks the real source tokens: a bool array `[B, S]`, or `True` if no source of the batch is padded; a
            leaf. Required: padding is never read, so counting it would lower all scores of a row by its amount of
            padding.

    Raises:
        TypeError: when called, `present` is not bool.
        ValueError: `beta` is known and negative or not finite; when called, `present` is missing or its shape does not
            match the source.

    >>> coverage = jnp.array([[[0.5, 1.5, 0.0], [1.0, 1.0, 0.0]]])
    >>> print(CoveragePenalty(beta=2.0, present=jnp.array([[True, True, False]]))(coverage))
    [[-1.3862944  0.       ]]
    """

    beta: Number = 0.2
    present: Bool[Array, "..."] | Bool[np.ndarray, "..."] | bool | None = None

    def __post_init__(self) -> None:
        check_range("beta", self.beta, minimum=0)

    def __call__(self, coverage: Float[Array, "B beams S"]) -> Float[Array, "B beams"]:
        """Returns the penalty `[B, beams]`.

        Args:
            coverage: `[B, beams, S]`, the sum of attention weights over all steps.
        """
        # Capped at 1: reading a token twice must not make up for one left out. The lower clip avoids log(0), which
        # would give every sequence with a gap the same score of -inf.
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
    """Returns one number for all rows; raises ValueError for arrays, since penalties are the same for all rows."""
    if jnp.ndim(value):
        raise ValueError(f"give one number for all rows, got the shape {jnp.shape(value)}")
    return jnp.asarray(value, jnp.float32)
