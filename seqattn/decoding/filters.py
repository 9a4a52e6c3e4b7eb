"""From which tokens a sample is drawn, and how boldly: logits processors that look at the logits alone."""

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
    """Divides the logits, the largest of a row taken as 0: below 1 what is probable becomes more so, above 1 less.

    0 is the limit: the best token alone stays, of equal ones the lowest. Since the largest is 0, no temperature makes
    logits overflow.

    Attributes:
        value: a leaf, one number or `[B]`.

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
        # What is smaller is 0 to hardware that knows no denormal numbers.
        greedy = value < np.finfo(np.float32).tiny
        largest = logits.max(axis=-1, keepdims=True)
        shifted = (logits - jnp.where(jnp.isneginf(largest), jnp.zeros_like(largest), largest)).astype(jnp.float32)
        divided = (shifted / jnp.where(greedy, jnp.ones_like(value), value)).astype(logits.dtype)
        return forbid(greedy & ~_is_best(logits), divided)

    def bound(self, highest: Float[Array, "B"]) -> Float[Array, "B"]:
        """0, since the largest is taken as 0."""
        return jnp.zeros_like(highest)


@pytree
@dataclasses.dataclass(frozen=True)
class TopK(Lowering):
    """Keeps the `count` most probable tokens, exactly: of equal ones the lowest (Fan 2018, section 5.4).

    Attributes:
        count: at least 1, static; all tokens are kept where it is at least the size of the vocabulary.

    >>> history = History(tokens=jnp.zeros((1, 1, 3), jnp.int32), length=jnp.array(0), first=jnp.array([[0]]))
    >>> print(TopK(2)(jnp.array([[[1.0, 2.0, 1.0, 0.0]]]), history))
    [[[  1.   2. -inf -inf]]]
    """

    count: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_integer("count", self.count, minimum=1)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        if self.count >= logits.shape[-1]:
            return logits
        logits = _one_zero(logits)
        values, tokens = jax.lax.top_k(logits, self.count)
        return forbid(~_at_least(logits, values[..., -1:], tokens[..., -1:]), logits)


@pytree
@dataclasses.dataclass(frozen=True)
class TopP(Lowering):
    """Keeps the smallest set of most probable tokens whose probability reaches `probability` (Holtzman 2020, 3.1).

    The token that crosses it is kept, and so at least one always; of equal tokens the lowest.

    Attributes:
        probability: in `[0, 1]`: 0 keeps the best token, 1 keeps all; a leaf, one number or `[B]`.

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
        order = jnp.argsort(-logits, axis=-1, stable=True).astype(jnp.int32)
        descending = jnp.take_along_axis(logits, order, axis=-1)
        reached = jnp.cumsum(jax.nn.softmax(descending.astype(jnp.float32), axis=-1), axis=-1)
        # A token is kept while those before it have not reached the probability; the best has none before it.
        kept = 1 + jnp.sum(reached[..., :-1] < wanted, axis=-1, keepdims=True, dtype=jnp.int32)
        last = jnp.take_along_axis(order, kept - 1, axis=-1)
        keep = _at_least(logits, jnp.take_along_axis(descending, kept - 1, axis=-1), last)
        # Sums are rounded, and reach 1 before the last token does.
        return forbid(~keep & (wanted < 1), logits)


@pytree
@dataclasses.dataclass(frozen=True)
class MinP(Lowering):
    """Keeps tokens at least `probability` times as probable as the best one (Nguyen 2024, section 3).

    Attributes:
        probability: in `[0, 1]`: 0 keeps all, 1 keeps the best and what equals it; a leaf, one number or `[B]`.

    >>> history = History(tokens=jnp.zeros((1, 1, 3), jnp.int32), length=jnp.array(0), first=jnp.array([[0]]))
    >>> print(jnp.exp(MinP(0.5)(jnp.log(jnp.array([[[0.125, 0.5, 0.125, 0.25]]])), history)))
    [[[0.   0.5  0.   0.25]]]
    """

    probability: Number

    def __post_init__(self) -> None:
        check_range("the probability of MinP", self.probability, minimum=0, maximum=1)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        # By probabilities, not their logs: no comparison with the log of 0.
        ratio = jnp.exp(logits.astype(jnp.float32) - logits.max(axis=-1, keepdims=True).astype(jnp.float32))
        return forbid(ratio < by_row(self.probability, logits, jnp.float32), logits)


@pytree
@dataclasses.dataclass(frozen=True)
class MinLogProbability(Lowering):
    """Keeps tokens with a log probability of at least `floor`, and the best one always.

    This is epsilon sampling (Hewitt 2022, section 4) with `floor = log(epsilon)`; as a processor of `beam_search` it
    keeps improbable tokens out of all hypotheses. Log probabilities are those of the logits that it is given: as the
    first processor those of the model. Of equal best tokens below the floor the lowest is kept.

    Attributes:
        floor: at most 0, in nats; a leaf, one number or `[B]`.

    >>> history = History(tokens=jnp.zeros((1, 1, 3), jnp.int32), length=jnp.array(0), first=jnp.array([[0]]))
    >>> print(jnp.exp(MinLogProbability(-2.0)(jnp.log(jnp.array([[[0.125, 0.5, 0.125, 0.25]]])), history)))
    [[[0.   0.5  0.   0.25]]]
    """

    floor: Number

    def __post_init__(self) -> None:
        check_range("the floor of MinLogProbability", self.floor, maximum=0)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        values = logits.astype(jnp.float32)
        below = Normaliser.of(values).log_probabilities(values) < by_row(self.floor, logits, jnp.float32)
        return forbid(below & ~_is_best(logits), logits)


def _is_best(logits: Float[Array, "B beams V"]) -> Bool[Array, "B beams V"]:
    """Of equal ones the lowest alone."""
    return _index(logits) == jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)


def _index(logits: Float[Array, "B beams V"]) -> Int[Array, "1 1 V"]:
    return jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]


def _one_zero(logits: Float[Array, "B beams V"]) -> Float[Array, "B beams V"]:
    # Sorting tells -0 from 0, comparing does not: they would not agree on which token is the lowest of equal ones.
    return jnp.where(logits == 0, jnp.zeros_like(logits), logits)


def _at_least(
    logits: Float[Array, "B beams V"], value: Float[Array, "B beams 1"], token: Int[Array, "B beams 1"]
) -> Bool[Array, "B beams V"]:
    """Whether each logit comes no later than the given one: in descending order, of equal logits the lowest first."""
    return (logits > value) | ((logits == value) & (_index(logits) <= token))
