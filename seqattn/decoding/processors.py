"""Logits processors: functions from logits and history to logits, as composable values.

They run in the given order. A forbidden token becomes -inf. NaN stays NaN, so that `generate` and `beam_search` can
detect a failed row.
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
"""One number for all rows, or an array `[B]` with one per row."""


@pytree
@dataclasses.dataclass(frozen=True)
class History:
    """The tokens of each hypothesis before this step.

    Attributes:
        tokens: `[B, beams, L]` integers, the generated tokens without the first token that was fed. Entries from
            `length` on are arbitrary.
        length: a scalar integer, the number of tokens generated so far; the same for all rows.
        first: `[B, beams]` integers, the first token that was fed.
    """

    tokens: Int[Array, "B beams L"]
    length: Int[Array, ""]
    first: Int[Array, "B beams"]

    def fed(self) -> Int[Array, "B beams fed"]:
        """Returns all tokens fed to the model `[B, beams, L + 1]`; the first `length + 1` are valid."""
        return jnp.concatenate([self.first[..., None].astype(self.tokens.dtype), self.tokens], axis=-1)


class LogitsProcessor(abc.ABC):
    """Base class of logits processors.

    A subclass is a pure function of logits and history: a frozen dataclass registered with `seqattn.pytrees.pytree`.
    """

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        """Returns the logits to use instead.

        Args:
            logits: `[B, beams, V]` float32. Raw logits in `generate`, log probabilities in `beam_search`.
            history: the tokens so far.

        Returns:
            Logits of the same shape and dtype; -inf forbids a token.
        """

    def bound(self, highest: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns an upper bound `[B]` of this processor's output if no logit of the row exceeds `highest` `[B]`.

        `beam_search` needs it to stop early without missing a better sequence, see `Stopping.EXACT`. Defaults to inf
        (unknown), which makes the search run until no hypothesis is live. A processor that adds at most 5 to a logit
        returns `highest + 5`. For a processor that never raises a logit, subclass `Lowering` instead.
        """
        return jnp.full_like(highest, jnp.inf)


class Lowering(LogitsProcessor):
    """Base class of processors that never raise a logit: they forbid tokens or lower their probability."""

    def bound(self, highest: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns `highest`."""
        return highest


@pytree
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty(LogitsProcessor):
    """Lowers the logits of tokens that already occurred (Keskar 2019, section 4.1).

    As in Hugging Face and other libraries, a positive logit is divided by `penalty` and a negative one multiplied by
    it; the paper divides both. A token is penalised once, however often it occurred. The first token that was fed
    counts as occurred, as in Hugging Face: a model that starts from its end token is penalised for ending.

    Attributes:
        penalty: above 0; above 1 discourages repetition, below 1 encourages it, 1 changes nothing. The paper uses about
            1.2. One number or one per row `[B]`; a leaf.

    Raises:
        ValueError: `penalty` is known and not above 0; when called, its shape is neither `()` nor `[B]`.

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
        # Dividing a negative logit would raise it, and so reward repetition.
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        # Entries from `length` on are leftovers of the buffer and must not count as said.
        length = history.tokens.shape[-1] + 1
        said = _tokens_at(jnp.arange(length) <= history.length, history.fed(), logits.shape[-1])
        return jnp.where(said, penalised, logits)

    def bound(self, highest: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns `highest`, or its penalised value if larger: a penalty below 1 raises logits."""
        penalty = by_row(self.penalty, highest[:, None, None])[:, 0, 0]
        return jnp.maximum(highest, jnp.where(highest > 0, highest / penalty, highest * penalty))


@pytree
@dataclasses.dataclass(frozen=True)
class NoRepeatNgram(Lowering):
    """Forbids tokens that would repeat an n-gram of `size` tokens (Paulus 2018, section 2.5).

    The first token that was fed is part of the text, as in Hugging Face. With size 1 it is never generated again, so a
    model that starts from its end token cannot end.

    Attributes:
        size: the n of the n-gram, at least 1; static. The paper uses 3.

    Raises:
        ValueError: `size` is below 1.

    >>> history = History(tokens=jnp.array([[[2, 3, 2, 0]]]), length=jnp.array(3), first=jnp.array([[1]]))
    >>> print(NoRepeatNgram(2)(jnp.zeros((1, 1, 5)), history))
    [[[  0.   0.   0. -inf   0.]]]
    """

    size: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_integer("size", self.size, minimum=1)

    def __call__(self, logits: Float[Array, "B beams V"], history: History) -> Float[Array, "B beams V"]:
        text, count = history.fed(), history.length + 1
        # A buffer shorter than one n-gram cannot hold a repetition, and would give a negative number of windows.
        starts = text.shape[-1] - self.size + 1
        if starts <= 0:
            return logits
        context = self.size - 1
        # The n - 1 latest tokens are the start of the n-gram that this step would complete. With fewer tokens the slice
        # is wrong, but then no window is complete either.
        latest = jax.lax.dynamic_slice_in_dim(text, count - context, context, axis=-1)
        # Compare with the start of every earlier n-gram at once: shapes are fixed, so there is no table of seen
        # n-grams.
        windows = text[..., jnp.arange(starts)[:, None] + jnp.arange(context)[None]]
        same = jnp.all(windows == latest[..., None, :], axis=-1)
        # Windows that reach past `length` end in arbitrary entries and would forbid random tokens.
        complete = jnp.arange(starts) + self.size <= count
        repeats = _tokens_at(same & complete[None, None], text[..., context:], logits.shape[-1])
        return forbid(repeats, logits)


@pytree
@dataclasses.dataclass(frozen=True)
class MinLength(Lowering):
    """Forbids the end token until a sequence has `length` tokens, including the end token, as in `Generated.length`.

    Attributes:
        length: a non-negative integer, one number or one per row `[B]`; a leaf.
        end_token: ends a sequence; static.

    Raises:
        ValueError: `length` is known and negative or not an integer, or `end_token` is negative; when called,
            `end_token` is not below the vocabulary size.

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
        # The end token chosen now would itself be token number length + 1.
        too_short = history.length + 1 < by_row(self.length, logits, jnp.int32)
        return forbid(too_short & _one_token(self.end_token, logits), logits)


class PrefixCost(enum.Enum):
    """What a forced token adds to the log probability of its sequence."""

    MODEL = "model"
    """The model's log probability, as if the search had chosen the token."""
    NOTHING = "nothing"
    """Counts 0, as Hugging Face, t5x and JoeyNMT do. Only the tokens after the prefix are scored."""


@pytree
@dataclasses.dataclass(frozen=True)
class ForcedPrefix(LogitsProcessor):
    """Forces the first tokens of each row: all other tokens are forbidden.

    From its `length` on a row is free. A prefix that contains the end token ends the row there. A row fails if a forced
    token is outside the vocabulary, or impossible to the model or to an earlier processor.

    Attributes:
        tokens: `[B, P]` integers; a leaf. Entries from `length` on are ignored.
        length: `[B]` integers from 0 to P, the number of forced tokens; a leaf.
        cost: what forced tokens add to the log probability; static. They count towards the length in either case.

    Raises:
        TypeError: `cost` is not a `PrefixCost`.
        ValueError: `length` is known and out of range; when called, `tokens` and `length` do not have B rows.

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
        # Past the prefix the index clamps to the last token, which the comparison with `length` then ignores.
        forced = jax.lax.dynamic_index_in_dim(tokens, history.length, axis=1)[..., None]
        others = forced != jnp.arange(logits.shape[-1], dtype=forced.dtype)[None, None]
        if self.cost is PrefixCost.NOTHING:
            # Only a finite logit becomes 0: an impossible or NaN token must still fail its row.
            is_free = ~others & self.is_free(history)[:, None, None] & jnp.isfinite(logits)
            logits = jnp.where(is_free, jnp.zeros_like(logits), logits)
        # Forbidding the others, instead of overwriting the choice, also works for beams: all hypotheses of the row
        # agree.
        return forbid(others & (history.length < length)[:, None, None], logits)

    def bound(self, highest: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns `highest`, at least 0 if forced tokens cost nothing."""
        return jnp.maximum(highest, 0) if self.cost is PrefixCost.NOTHING else highest

    def is_free(self, history: History) -> Bool[Array, "B"]:
        """Returns, per row `[B]`, whether the next token is forced and costs nothing."""
        return (history.length < jnp.asarray(self.length)) & (self.cost is PrefixCost.NOTHING)


@pytree
@dataclasses.dataclass(frozen=True)
class Banned(Lowering):
    """Forbids some tokens at every step.

    Attributes:
        tokens: a tuple of token ids; static.

    Raises:
        TypeError: `tokens` is not a tuple.
        ValueError: a token is negative; when called, a token is not below the vocabulary size.

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
        # Computed in NumPy at trace time, so the mask is a constant of the compiled program.
        banned = np.isin(np.arange(logits.shape[-1]), self.tokens)
        return forbid(jnp.asarray(banned)[None, None], logits)


def process(
    processors: Sequence[LogitsProcessor], logits: Float[Array, "B beams V"], history: History
) -> Float[Array, "B beams V"]:
    """Returns the logits after all processors, in order.

    Raises:
        ValueError: a processor changes the shape or the dtype.
    """
    for processor in processors:
        result = jnp.asarray(processor(logits, history))
        # A broadcast or promoted result would pass silently and change the search.
        if result.shape != logits.shape or result.dtype != logits.dtype:
            raise ValueError(
                f"{type(processor).__name__} must return logits {logits.shape} of {logits.dtype}, as it was given, "
                f"got {result.shape} of {result.dtype}"
            )
        logits = result
    return logits


def highest_after(processors: Sequence[LogitsProcessor], num_rows: int) -> Float[Array, "num_rows"]:
    """Returns the most that one step can add to the log probability of each row; inf if a processor does not know.

    Raises:
        ValueError: a bound is not one number per row.
    """
    # A log probability is at most 0. Each processor then maps the bound of the ones before it.
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
    """Sets logits to -inf there. NaN stays NaN, so that a failing model is noticed."""
    return jnp.where(where & ~jnp.isnan(logits), jnp.full((), -jnp.inf, logits.dtype), logits)


def by_row(value: Number, logits: Float[Array, "B beams V"], dtype: DTypeLike | None = None) -> Num[Array, "#B 1 1"]:
    """Returns one number, or one per row `[B]`, in a shape that broadcasts against the logits.

    Defaults to the dtype of the logits.

    Raises:
        ValueError: `value` has another shape.
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
    """Marks the tokens of the vocabulary that occur in each row at the given places."""
    # Ignored places point past the vocabulary, where `mode="drop"` discards them. Negative tokens would wrap around.
    counted = jnp.where(
        where.reshape((1,) * (tokens.ndim - where.ndim) + where.shape) & (tokens >= 0), tokens, vocab_size
    )
    # A scatter costs O(L) per hypothesis; a comparison with every token would need an array of L x V.
    rows = counted.reshape(-1, counted.shape[-1])
    found = jnp.zeros((rows.shape[0], vocab_size), bool)
    found = found.at[jnp.arange(rows.shape[0])[:, None], rows].set(True, mode="drop")
    return found.reshape(*tokens.shape[:-1], vocab_size)
