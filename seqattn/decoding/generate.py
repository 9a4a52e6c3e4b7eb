"""Greedy decoding and sampling from any step function, in one jitted loop."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from seqattn.decoding.arguments import (
    check_limits,
    check_logits,
    checked_first_token,
    checked_processors,
    checked_row_limit,
)
from seqattn.decoding.processors import ForcedPrefix, History, LogitsProcessor, Number, process
from seqattn.decoding.sampling import Greedy, Sampling, row_keys
from seqattn.pytrees import pytree
from seqattn.top_k import Normaliser

Step = Callable[[Array, Any], tuple[Array, Any]]
"""`step(tokens [B], state) -> (logits [B, V], state)`; the state is any pytree with the batch on the leading axis."""


@pytree
@dataclasses.dataclass(frozen=True)
class Generated:
    """The sequences that `generate` produced.

    Attributes:
        tokens: `[B, max_length]` int32. Excludes the first token, includes the end token; `pad_token` follows.
        length: `[B]` int32, the number of tokens including the end token.
        log_probability: `[B]` float32, the sum over those tokens, in nats. It is the model's own, whatever chose the
            tokens; only the tokens of a `ForcedPrefix` with `PrefixCost.NOTHING` count 0.
        ended: `[B]` bool, whether the row reached its end token.
        failed: `[B]` bool, whether the row met logits with NaN or inf, or of -inf only, for example because processors
            forbid every token that the model allows. The row stops before that token.
    """

    tokens: Int[Array, "B L"]
    length: Int[Array, "B"]
    log_probability: Float[Array, "B"]
    ended: Bool[Array, "B"]
    failed: Bool[Array, "B"]


_GREEDY = Greedy()


def generate(
    step: Step,
    state: Any,
    first_token: Int[Array, "B"],
    *,
    max_length: int,
    end_token: int,
    pad_token: int = 0,
    processors: Sequence[LogitsProcessor] = (),
    row_limit: Number | None = None,
    sampling: Sampling = _GREEDY,
    key: Shaped[Array, "..."] | None = None,
) -> Generated:
    """Generates tokens one by one until every row has ended: the most probable ones, or random draws.

    Works with any pure step function. The loop is one `lax.while_loop`. Ties go to the lowest token. Each call outside
    `jit` compiles the loop again, so to decode many batches, jit a function of your own: `jax.jit(lambda model, memory,
    first: generate(model.step, model.start(memory, 50), first, max_length=50, ...))`.

    Args:
        step: `step(tokens [B], state) -> (logits [B, V], state)`.
        state: any pytree with the batch on the leading axis.
        first_token: `[B]` integers, the token that is fed first.
        max_length: maximum number of tokens per row, including the end token; at least 1.
        end_token: ends a row.
        pad_token: fills a row after its end. Must differ from `end_token`.
        processors: applied in order to the float32 logits: penalties, bans, prefixes.
        row_limit: maximum number of tokens, one number or one per row `[B]`, integers from 1 to `max_length`. A row
            generates the same as it does alone with this `max_length`. Traced values are clipped to the range. The
            result keeps the size `max_length`.
        sampling: `Greedy()`, or `Sample((Temperature(0.7), TopP(0.9)))`, whose filters run after the processors.
        key: for `Sample`, one random key or one per row `[B]`. A row's tokens depend only on its own key and logits: a
            single key is folded with the index of the row (see `row_keys`), then with the index of the step.

    Returns:
        One sequence per row.

    Raises:
        TypeError: `key` is not a random key, `first_token` or `row_limit` is not of integers, `processors` is not a
            sequence of processors, or `sampling` is not a `Sampling`.
        ValueError: `max_length` is below 1, `row_limit` is out of range, the end and pad tokens are equal (a finished
            row would look like padding), the end token is not in the vocabulary, `sampling` needs a key and there is
            none, there is not one key per row, or the logits are not `[B, V]`.

    A user's own step function, which counts down from the given token:

    >>> def step(tokens, state):
    ...     return 9 * jax.nn.one_hot(tokens - 1, 5), state
    >>> found = generate(step, (), jnp.array([4, 2]), max_length=6, end_token=1)
    >>> print(found.tokens, found.length)
    [[3 2 1 0 0 0]
     [1 0 0 0 0 0]] [3 1]

    With 2 banned, all other tokens tie after 3, and the lowest wins:

    >>> from seqattn.decoding import Banned, Sample, Temperature, TopK
    >>> print(generate(step, (), jnp.array([4]), max_length=4, end_token=1, processors=(Banned((2,)),)).tokens)
    [[3 0 0 0]]

    Random draws, at a temperature high enough to stray from the count:

    >>> bold = Sample((Temperature(9.0), TopK(3)))
    >>> found = generate(step, (), jnp.array([4, 4]), max_length=6, end_token=1, sampling=bold, key=jax.random.key(1))
    >>> print(found.tokens)
    [[3 0 2 1 0 0]
     [1 0 0 0 0 0]]
    """
    check_limits(max_length, end_token, pad_token)
    first_token = checked_first_token(first_token)
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling must be Greedy() or Sample(filters), got {sampling!r}")
    limit = checked_row_limit(row_limit, max_length, first_token.shape[0])
    keys = _keys(sampling, key, first_token.shape[0])
    # Filters come last: a ban that came after top-p could forbid every token that top-p kept.
    processors = (*checked_processors(processors), *sampling.filters)

    def unfinished(loop: tuple[Array, Array, Any, Generated]) -> Array:
        found = loop[-1]
        # The loop ends with the longest row. It always ends, since each live row gains a token per step.
        return ~jnp.all(_is_over(found, limit))

    def advance(loop: tuple[Array, Array, Any, Generated]) -> tuple[Array, Array, Any, Generated]:
        index, tokens, state, found = loop
        # All rows take the step, finished ones with padding: shapes are fixed in a compiled loop.
        logits, state = step(tokens, state)
        check_logits(logits, first_token.shape[0], end_token)
        # Sums of log probabilities over many steps lose too much in bfloat16.
        logits = logits.astype(jnp.float32)
        # Processors expect an axis of hypotheses, so greedy decoding is a beam of 1 to them.
        history = History(found.tokens[:, None], index, first_token[:, None])
        allowed = process(processors, logits[:, None], history)[:, 0]
        # The processed logits decide; the model's own logits give the reported log probability below. Bans and filters
        # thus do not change how probable the model finds a sequence.
        chosen = sampling.choose(allowed, _step_keys(keys, index))
        # The normaliser is not finite if a logit is NaN or inf, or if all are -inf. Test before and after processors:
        # they may hide a failure of the model, or forbid every token.
        normaliser = Normaliser.of(logits)
        works = normaliser.is_finite & Normaliser.of(allowed).is_finite if processors else normaliser.is_finite
        # Only the chosen logit is normalised, which avoids an array of log probabilities `[B, V]`.
        gained = normaliser.log_probabilities(jnp.take_along_axis(logits, chosen[:, None], axis=-1))[:, 0]
        gained = _without_free(gained, processors, history)
        tokens, found = _extend(found, chosen, gained, ~works, index, limit, end_token, pad_token)
        return index + 1, tokens, state, found

    # The result has its full size from the start, since the carry of a while_loop cannot grow.
    start = _nothing(first_token.shape[0], max_length, pad_token)
    loop = (jnp.zeros((), jnp.int32), first_token, state, start)
    return jax.lax.while_loop(unfinished, advance, loop)[-1]


def _nothing(num_rows: int, max_length: int, pad_token: int) -> Generated:
    return Generated(
        tokens=jnp.full((num_rows, max_length), pad_token, jnp.int32),
        length=jnp.zeros(num_rows, jnp.int32),
        log_probability=jnp.zeros(num_rows, jnp.float32),
        ended=jnp.zeros(num_rows, bool),
        failed=jnp.zeros(num_rows, bool),
    )


def _keys(sampling: Sampling, key: Shaped[Array, "..."] | None, num_rows: int) -> Key[Array, "num_rows"] | None:
    # Without keys in the loop, greedy decoding compiles no random number generator.
    if not sampling.random:
        return None
    if key is None:
        raise ValueError(f"{type(sampling).__name__} needs a key: generate(..., key=jax.random.key(0))")
    return row_keys(key, num_rows)


def _step_keys(keys: Key[Array, "B"] | None, index: Int[Array, ""]) -> Key[Array, "B"] | None:
    # Each step needs fresh noise. Folding in the step index avoids carrying keys through the loop.
    return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)


def _is_over(found: Generated, limit: Int[Array, "B"]) -> Bool[Array, "B"]:
    return found.ended | found.failed | (found.length >= limit)


def _without_free(
    gained: Float[Array, "B"], processors: Sequence[LogitsProcessor], history: History
) -> Float[Array, "B"]:
    for processor in processors:
        if isinstance(processor, ForcedPrefix):
            # A free forced token counts 0: its model log probability from above is dropped.
            gained = jnp.where(processor.is_free(history), 0.0, gained)
    return gained


def _extend(
    found: Generated,
    chosen: Int[Array, "B"],
    gained: Float[Array, "B"],
    broken: Bool[Array, "B"],
    index: Int[Array, ""],
    limit: Int[Array, "B"],
    end_token: int,
    pad_token: int,
) -> tuple[Array, Generated]:
    """Appends the next token to each live row."""
    running = ~_is_over(found, limit)
    # A finished row keeps its result, even if the padding it is fed breaks the model.
    failed = found.failed | (broken & running)
    running = running & ~broken
    # A row that fails now stops before this token: a choice from broken logits means nothing.
    token = jnp.where(running, chosen, pad_token)
    return token, Generated(
        tokens=found.tokens.at[:, index].set(token),
        length=found.length + running.astype(jnp.int32),
        log_probability=found.log_probability + jnp.where(running, gained, 0.0),
        ended=found.ended | (running & (token == end_token)),
        failed=failed,
    )
