"""Filters for sampling: logits processors that depend on the logits alone, not on the history."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqattn.checks import check_integer, check_range
from seqattn.decoding.processors import History, LogitsProcessor, Lowering, Number, by_row, forbid
from seqattn.pytrees import pytree
from seqattn.top_k import Normaliser


@pytree
@dataclasses.dataclass(frozen=True)
class Temperature(LogitsProcessor):
    """Divides the logits by a temperature after shifting each row's maximum to 0 (Ackley 1985).

    Values below 1 sharpen the distribution, values above 1 flatten it. 0 is the limit: only the most probable token
    remains, ties go to the lowest. Because of the shift no temperature makes logits overflow.

    Attributes:
        value: at least 0, one number or one per row `[B]`; a leaf.

    Raises:
        ValueError: `value` is known and negative or not finite; when called, its shape is neither `()` nor `[B]`.

    >>> history = History(tokens=jnp.zeros((1, 1, 3), jnp.int32), length=jnp.array(0), first=jnp.array([[0]]))
    >>> print(Temperature(0.5)(jnp.array([[[1.0, 2.0, 2.0]]]), history))
    [[[-2.  0.  0.]]]
    >>> print(Temperature(0)(jnp.array([[[1.0, 2.0, 2.0]]]), history))
    [[[-inf   0. -inf]]]
    """

    value: Number

    def __post_init__(self) -> None:
        check_range("temperature", self.value, minimum=0)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        value = by_row(self.value, logits, jnp.float32)
        # Hardware that flushes denormal numbers would divide by 0, so these temperatures count as 0, too.
        greedy = value < np.finfo(np.float32).tiny
        # Softmax ignores a shift. With a maximum of 0, dividing by a tiny temperature gives -inf at worst, never inf.
        largest = logits.max(axis=-1, keepdims=True)
        # A row of -inf alone stays -inf: -inf - -inf would be NaN, a failure of another kind.
        shifted = (logits - jnp.where(jnp.isneginf(largest), jnp.zeros_like(largest), largest)).astype(jnp.float32)
        divided = (shifted / jnp.where(greedy, jnp.ones_like(value), value)).astype(logits.dtype)
        # Temperature 0 cannot divide. It keeps one token even among ties, so that it agrees with greedy search.
        return forbid(greedy & ~_is_best(logits), divided)

    def bound(self, highest: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns 0, to which the maximum is shifted."""
        return jnp.zeros_like(highest)


@pytree
@dataclasses.dataclass(frozen=True)
class TopK(Lowering):
    """Keeps the `count` most probable tokens (Fan 2018, section 5.4).

    Keeps exactly `count` tokens: ties go to the lowest.

    Attributes:
        count: at least 1; static. Keeps all tokens if it is at least the vocabulary size.

    Raises:
        ValueError: `count` is below 1.

    >>> history = History(tokens=jnp.zeros((1, 1, 3), jnp.int32), length=jnp.array(0), first=jnp.array([[0]]))
    >>> print(TopK(2)(jnp.array([[[1.0, 2.0, 1.0, 0.0]]]), history))
    [[[  1.   2. -inf -inf]]]
    """

    count: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_integer("count", self.count, minimum=1)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        # `lax.top_k` rejects a count above the vocabulary size, and nothing needs to be removed.
        if self.count >= logits.shape[-1]:
            return logits
        logits = _one_zero(logits)
        values, tokens = jax.lax.top_k(logits, self.count)
        # Comparing with the last kept token avoids a scatter. Comparing values alone would keep every tied token.
        return forbid(~_at_least(logits, values[..., -1:], tokens[..., -1:]), logits)


@pytree
@dataclasses.dataclass(frozen=True)
class TopP(Lowering):
    """Nucleus sampling: keeps the smallest set of most probable tokens that reaches `probability` (Holtzman 2020, 3.1).

    The token that crosses the threshold is kept, so at least one token remains. Ties go to the lowest token.

    Attributes:
        probability: the threshold in `[0, 1]`; 0 keeps the best token, 1 keeps all. One number or one per row `[B]`; a
            leaf.

    Raises:
        ValueError: `probability` is known and outside `[0, 1]`; when called, its shape is neither `()` nor `[B]`.

    >>> history = History(tokens=jnp.zeros((1, 1, 3), jnp.int32), length=jnp.array(0), first=jnp.array([[0]]))
    >>> print(jnp.exp(TopP(0.6)(jnp.log(jnp.array([[[0.125, 0.5, 0.125, 0.25]]])), history)))
    [[[0.   0.5  0.   0.25]]]
    """

    probability: Number

    def __post_init__(self) -> None:
        check_range("the probability of TopP", self.probability, minimum=0, maximum=1)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        logits = _one_zero(logits)
        wanted = by_row(self.probability, logits, jnp.float32)
        # The nucleus is a prefix of the tokens in descending order. A stable sort makes ties go to the lowest token.
        order = jnp.argsort(-logits, axis=-1, stable=True).astype(jnp.int32)
        descending = jnp.take_along_axis(logits, order, axis=-1)
        # The cumulative probabilities need float32: bfloat16 sums of a long tail stop growing.
        reached = jnp.cumsum(jax.nn.softmax(descending.astype(jnp.float32), axis=-1), axis=-1)
        # A token is kept while the sum before it is below the threshold. The best token has nothing before it, so it is
        # always kept and no row becomes empty.
        kept = 1 + jnp.sum(reached[..., :-1] < wanted, axis=-1, keepdims=True, dtype=jnp.int32)
        # As in TopK, comparing with the last kept token replaces a scatter back to vocabulary order.
        last = jnp.take_along_axis(order, kept - 1, axis=-1)
        keep = _at_least(logits, jnp.take_along_axis(descending, kept - 1, axis=-1), last)
        # Rounded sums reach 1 before the last token, so a threshold of 1 would drop the tail that it must keep.
        return forbid(~keep & (wanted < 1), logits)


@pytree
@dataclasses.dataclass(frozen=True)
class MinP(Lowering):
    """Keeps tokens at least `probability` times as probable as the best token (Nguyen 2024, section 3).

    Attributes:
        probability: the ratio in `[0, 1]`; 0 keeps all tokens, 1 keeps the best and its ties. One number or one per row
            `[B]`; a leaf.

    Raises:
        ValueError: `probability` is known and outside `[0, 1]`; when called, its shape is neither `()` nor `[B]`.

    >>> history = History(tokens=jnp.zeros((1, 1, 3), jnp.int32), length=jnp.array(0), first=jnp.array([[0]]))
    >>> print(jnp.exp(MinP(0.5)(jnp.log(jnp.array([[[0.125, 0.5, 0.125, 0.25]]])), history)))
    [[[0.   0.5  0.   0.25]]]
    """

    probability: Number

    def __post_init__(self) -> None:
        check_range("the probability of MinP", self.probability, minimum=0, maximum=1)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        # Compare ratios of probabilities, not of logs: a ratio of 0 would need log(0). The normaliser cancels.
        ratio = jnp.exp(logits.astype(jnp.float32) - logits.max(axis=-1, keepdims=True).astype(jnp.float32))
        return forbid(ratio < by_row(self.probability, logits, jnp.float32), logits)


@pytree
@dataclasses.dataclass(frozen=True)
class MinLogProbability(Lowering):
    """Keeps tokens with a log probability of at least `floor`, and always the best token.

    This is epsilon sampling (Hewitt 2022, section 4) with `floor = log(epsilon)`. As a processor of `beam_search` it
    keeps improbable tokens out of every hypothesis. Log probabilities are computed from the given logits: as the first
    processor, from the model's own. If the best tokens are below the floor and tie, the lowest is kept.

    Attributes:
        floor: at most 0, in nats; one number or one per row `[B]`; a leaf.

    Raises:
        ValueError: `floor` is known and above 0 or not finite; when called, its shape is neither `()` nor `[B]`.

    >>> history = History(tokens=jnp.zeros((1, 1, 3), jnp.int32), length=jnp.array(0), first=jnp.array([[0]]))
    >>> print(jnp.exp(MinLogProbability(-2.0)(jnp.log(jnp.array([[[0.125, 0.5, 0.125, 0.25]]])), history)))
    [[[0.   0.5  0.   0.25]]]
    """

    floor: Number

    def __post_init__(self) -> None:
        check_range("the floor of MinLogProbability", self.floor, maximum=0)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        values = logits.astype(jnp.float32)
        # Normalise first: logits have an arbitrary offset, so a floor on raw logits would mean nothing.
        below = Normaliser.of(values).log_probabilities(values) < by_row(self.floor, logits, jnp.float32)
        # In a flat distribution every token may be below the floor. Without the best one the row would fail.
        return forbid(below & ~_is_best(logits), logits)


def _is_best(logits: Float[Array, "B beams V"]) -> Bool[Array, "B beams V"]:
    """Marks the best token of each row; ties go to the lowest."""
    return _index(logits) == jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)


def _index(logits: Float[Array, "B beams V"]) -> Int[Array, "1 1 V"]:
    return jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]


def _one_zero(logits: Float[Array, "B beams V"]) -> Float[Array, "B beams V"]:
    # Sorting orders -0 before 0 but comparison finds them equal, so the two would disagree on ties.
    return jnp.where(logits == 0, jnp.zeros_like(logits), logits)


def _at_least(
    logits: Float[Array, "B beams V"], value: Float[Array, "B beams 1"], token: Int[Array, "B beams 1"]
) -> Bool[Array, "B beams V"]:
    """Whether each logit ranks at or before the given one, in descending order with ties to the lowest token."""
    return (logits > value) | ((logits == value) & (_index(logits) <= token))
