"""What a decoder may say: functions from logits and history to logits, as values that compose.

They are applied in the order in which they are given. What a processor forbids is -inf; NaN stays NaN, so that
`generate` and `beam_search` see that a row failed.
"""

import abc
import dataclasses
import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from seqattn.checks import check_integer, check_range, is_known
from seqattn.pytrees import pytree, static

Number = float | int | np.number | np.ndarray | Array
"""A number for all rows, or an array `[B]` with one for each."""


@pytree
@dataclasses.dataclass(frozen=True)
class History:
    """What each hypothesis has said before this step.

    Attributes:
        tokens: generated so far `[B, beams, L]`, without the first token that was fed; what is at or behind `length`
            means nothing.
        length: how many tokens have been generated, the same for all rows; a scalar.
        first: the first token that was fed `[B, beams]`.
    """

    tokens: Int[Array, "B beams L"]
    length: Int[Array, ""]
    first: Int[Array, "B beams"]

    def fed(self) -> Int[Array, "B beams fed"]:
        """All that the model was fed: the first token, then what was generated. The first `length + 1` count."""
        return jnp.concatenate([self.first[..., None].astype(self.tokens.dtype), self.tokens], axis=-1)


class LogitsProcessor(abc.ABC):
    """A pure function of logits and history, as a frozen dataclass that is a pytree: base it on this class."""

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        """The logits with which to go on, of the same shape; -inf is what may not be said."""

    def bound(self, highest: Float[Array, "B"]) -> Float[Array, "B"]:
        """An upper bound of what this returns for each row, given that none of the row's logits exceeds `highest`.

        `beam_search` needs it to stop early without missing a better sequence, see `Stopping.EXACT`. By default it is
        inf, unknown, and the search goes on to its last step. A processor that adds at most 5 to a logit returns
        `highest + 5`. Base a processor that never raises a logit on `Lowering` instead.
        """
        return jnp.full_like(highest, jnp.inf)


class Lowering(LogitsProcessor):
    """A processor that never raises a logit: it forbids tokens or makes them less probable. Base your own on it."""

    def bound(self, highest: Float[Array, "B"]) -> Float[Array, "B"]:
        """`highest` itself."""
        return highest


@pytree
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty(LogitsProcessor):
    """Makes tokens that were said before less probable (Keskar 2019, section 4.1).

    As in the libraries that followed the paper, a positive logit is divided by `penalty` and a negative one multiplied,
    once however often the token occurred. The first token that was fed counts as said, as Hugging Face has it: a model
    that starts from its end token is penalised for ending.

    Attributes:
        penalty: above 1 discourages, below 1 encourages, 1 changes nothing; a leaf, one number or `[B]`.

    >>> logits = jnp.array([[[2.0, -2.0, 2.0, -2.0]]])
    >>> history = History(tokens=jnp.array([[[0, 3]]]), length=jnp.array(1), first=jnp.array([[1]]))
    >>> print(RepetitionPenalty(2.0)(logits, history))
    [[[ 1. -4.  2. -2.]]]
    """

    penalty: Number

    def __post_init__(self) -> None:
        check_range("penalty", self.penalty, above=0)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        penalty = by_row(self.penalty, logits)
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        length = history.tokens.shape[-1] + 1
        said = _tokens_at(jnp.arange(length) <= history.length, history.fed(), logits.shape[-1])
        return jnp.where(said, penalised, logits)

    def bound(self, highest: Float[Array, "B"]) -> Float[Array, "B"]:
        """`highest`, or what the penalty makes of it where that is more: one below 1 raises negative logits."""
        penalty = by_row(self.penalty, highest[:, None, None])[:, 0, 0]
        return jnp.maximum(highest, jnp.where(highest > 0, highest / penalty, highest * penalty))


@pytree
@dataclasses.dataclass(frozen=True)
class NoRepeatNgram(Lowering):
    """Forbids what would say the same `size` tokens in a row a second time (Paulus 2018, section 2.5).

    The first token that was fed is part of the text, as Hugging Face has it: with size 1 it is never said, so a model
    that starts from its end token would not end.

    Attributes:
        size: how many tokens in a row, static.

    >>> history = History(tokens=jnp.array([[[2, 3, 2, 0]]]), length=jnp.array(3), first=jnp.array([[1]]))
    >>> print(NoRepeatNgram(2)(jnp.zeros((1, 1, 5)), history))
    [[[  0.   0.   0. -inf   0.]]]
    """

    size: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_integer("size", self.size, minimum=1)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        text, count = history.fed(), history.length + 1
        starts = text.shape[-1] - self.size + 1
        if starts <= 0:
            return logits
        context = self.size - 1
        # With fewer tokens than these the slice holds others, and no window is complete.
        latest = jax.lax.dynamic_slice_in_dim(text, count - context, context, axis=-1)
        windows = text[..., jnp.arange(starts)[:, None] + jnp.arange(context)[None]]
        same = jnp.all(windows == latest[..., None, :], axis=-1)
        complete = jnp.arange(starts) + self.size <= count
        repeats = _tokens_at(same & complete[None, None], text[..., context:], logits.shape[-1])
        return forbid(repeats, logits)


@pytree
@dataclasses.dataclass(frozen=True)
class MinLength(Lowering):
    """No text has fewer than `length` tokens, the end token counted, as in `Generated.length`.

    Attributes:
        length: a leaf, one number or `[B]`.
        end_token: what ends a text, static.

    >>> history = History(tokens=jnp.zeros((1, 1, 3), jnp.int32), length=jnp.array(1), first=jnp.array([[0]]))
    >>> print(MinLength(2, end_token=1)(jnp.zeros((1, 1, 3)), history))
    [[[0. 0. 0.]]]
    >>> print(MinLength(3, end_token=1)(jnp.zeros((1, 1, 3)), history))
    [[[  0. -inf   0.]]]
    """

    length: Number
    end_token: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_range("length", self.length, minimum=0, maximum=np.iinfo(np.int32).max)
        if is_known(self.length) and np.any(np.asarray(self.length) % 1):
            raise ValueError(f"length ({self.length}) must be an integer, or one for each row")
        check_integer("end_token", self.end_token, minimum=0)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        _check_vocabulary("end_token", self.end_token, logits)
        too_short = history.length + 1 < by_row(self.length, logits, jnp.int32)
        return forbid(too_short & _one_token(self.end_token, logits), logits)


class PrefixCost(enum.Enum):
    """What a forced token adds to the log probability of its sequence."""

    MODEL = "model"
    """What the model says, as if the search had chosen it."""
    NOTHING = "nothing"
    """0, as in Hugging Face, t5x and JoeyNMT: only what follows the prefix is scored."""


@pytree
@dataclasses.dataclass(frozen=True)
class ForcedPrefix(LogitsProcessor):
    """The first tokens of each row are given: all others are forbidden.

    A row is free behind its `length`. A prefix that holds the end token ends the row there. A token that the model, or
    a processor before this one, holds for impossible, or that is not in the vocabulary, fails its row.

    Attributes:
        tokens: `[B, P]`, a leaf; what is at or behind `length` means nothing.
        length: how many of them are forced `[B]`, a leaf.
        cost: what they add to the log probability, static. They count in the length of a sequence in either case.

    >>> history = History(tokens=jnp.zeros((2, 1, 3), jnp.int32), length=jnp.array(1), first=jnp.array([[0], [0]]))
    >>> print(ForcedPrefix(jnp.array([[1, 2], [1, 0]]), jnp.array([2, 1]))(jnp.zeros((2, 1, 3)), history)[:, 0])
    [[-inf -inf   0.]
     [  0.   0.   0.]]
    """

    tokens: Int[Array, "*batch P"] | Int[np.ndarray, "*batch P"]
    length: Int[Array, "*batch"] | Int[np.ndarray, "*batch"]
    cost: PrefixCost = static(default=PrefixCost.MODEL)

    def __post_init__(self) -> None:
        if not isinstance(self.cost, PrefixCost):
            raise TypeError(f"cost must be a PrefixCost, got {self.cost!r}")
        if is_known(self.length) and isinstance(self.tokens, (np.ndarray, jax.Array)):
            check_range("a length of a forced prefix", self.length, minimum=0, maximum=self.tokens.shape[-1])

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        tokens, length = jnp.asarray(self.tokens), jnp.asarray(self.length)
        if tokens.ndim != 2 or tokens.shape[0] != logits.shape[0] or length.shape != tokens.shape[:1]:
            raise ValueError(
                f"a forced prefix needs tokens [B, P] and length [B] for B {logits.shape[0]} rows, "
                f"got {tokens.shape} and {length.shape}"
            )
        if tokens.shape[1] == 0:
            return logits
        forced = jax.lax.dynamic_index_in_dim(tokens, history.length, axis=1)[..., None]
        others = forced != jnp.arange(logits.shape[-1], dtype=forced.dtype)[None, None]
        if self.cost is PrefixCost.NOTHING:
            is_free = ~others & self.is_free(history)[:, None, None] & jnp.isfinite(logits)
            logits = jnp.where(is_free, jnp.zeros_like(logits), logits)
        return forbid(others & (history.length < length)[:, None, None], logits)

    def bound(self, highest: Float[Array, "B"]) -> Float[Array, "B"]:
        """`highest`, and at least 0 where forced tokens cost nothing."""
        return jnp.maximum(highest, 0) if self.cost is PrefixCost.NOTHING else highest

    def is_free(self, history: History) -> Bool[Array, "B"]:
        """In which rows the next token is forced and costs nothing."""
        return (history.length < jnp.asarray(self.length)) & (self.cost is PrefixCost.NOTHING)


@pytree
@dataclasses.dataclass(frozen=True)
class Banned(Lowering):
    """Tokens that are never said.

    Attributes:
        tokens: which, static.

    >>> history = History(tokens=jnp.zeros((1, 1, 3), jnp.int32), length=jnp.array(0), first=jnp.array([[0]]))
    >>> print(Banned((0, 2))(jnp.zeros((1, 1, 4)), history))
    [[[-inf   0. -inf   0.]]]
    """

    tokens: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, tuple):
            raise TypeError(f"tokens must be a tuple, got {self.tokens!r}")
        for token in self.tokens:
            check_integer("a banned token", token, minimum=0)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        for token in self.tokens:
            _check_vocabulary("a banned token", token, logits)
        banned = np.isin(np.arange(logits.shape[-1]), self.tokens)
        return forbid(jnp.asarray(banned)[None, None], logits)


def process(
    processors: Sequence[LogitsProcessor], logits: Float[Array, "B beams V"], history: History
) -> Float[Array, "B beams V"]:
    """The logits after all processors, in order.

    Raises:
        ValueError: one gives another shape or dtype than it was given.
    """
    for processor in processors:
        result = jnp.asarray(processor(logits, history))
        if result.shape != logits.shape or result.dtype != logits.dtype:
            raise ValueError(
                f"{type(processor).__name__} must return logits {logits.shape} of {logits.dtype}, as it was given, "
                f"got {result.shape} of {result.dtype}"
            )
        logits = result
    return logits


def highest_after(processors: Sequence[LogitsProcessor], num_rows: int) -> Float[Array, "num_rows"]:
    """The most that a step can add to the log probability of each row, inf where a processor does not say.

    Raises:
        ValueError: a bound that is not one number for each row.
    """
    highest = jnp.zeros(num_rows, jnp.float32)
    for processor in processors:
        bound = jnp.asarray(processor.bound(highest), jnp.float32)
        if bound.shape != highest.shape:
            raise ValueError(
                f"the bound of {type(processor).__name__} must be one number for each of {num_rows} rows, "
                f"got the shape {bound.shape}"
            )
        highest = bound
    return highest


def forbid(where: Bool[Array, "#B #beams V"], logits: Float[Array, "B beams V"]) -> Float[Array, "B beams V"]:
    """-inf there; NaN stays NaN: a model that fails must not be hidden."""
    return jnp.where(where & ~jnp.isnan(logits), jnp.full((), -jnp.inf, logits.dtype), logits)


def by_row(value: Number, logits: Float[Array, "B beams V"], dtype: DTypeLike | None = None) -> Num[Array, "#B 1 1"]:
    """A number for all rows or one for each `[B]`, to broadcast against the logits; by default in their dtype.

    Raises:
        ValueError: it has another shape.
    """
    value = jnp.asarray(value).astype(logits.dtype if dtype is None else dtype)
    if value.shape not in ((), logits.shape[:1]):
        raise ValueError(f"give one number or one for each of {logits.shape[0]} rows, got the shape {value.shape}")
    return value.reshape(-1, 1, 1)


def _check_vocabulary(name: str, token: int, logits: Float[Array, "B beams V"]) -> None:
    if token >= logits.shape[-1]:
        raise ValueError(f"{name} ({token}) must be below the size of the vocabulary ({logits.shape[-1]})")


def _one_token(token: int, logits: Float[Array, "B beams V"]) -> Bool[Array, "1 1 V"]:
    return (jnp.arange(logits.shape[-1]) == token)[None, None]


def _tokens_at(
    where: Bool[Array, "*#rows L"], tokens: Int[Array, "*rows L"], vocab_size: int
) -> Bool[Array, "*rows V"]:
    """Which tokens of the vocabulary are among those of each row at the given places."""
    counted = jnp.where(
        where.reshape((1,) * (tokens.ndim - where.ndim) + where.shape) & (tokens >= 0), tokens, vocab_size
    )
    rows = counted.reshape(-1, counted.shape[-1])
    found = jnp.zeros((rows.shape[0], vocab_size), bool)
    found = found.at[jnp.arange(rows.shape[0])[:, None], rows].set(True, mode="drop")
    return found.reshape(*tokens.shape[:-1], vocab_size)
