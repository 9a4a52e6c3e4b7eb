"""From a step function to sequences: one token after the other, the best or one at random, in one jitted loop."""

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
"""`step(tokens [B], state) -> (logits [B, V], state)`; the state is any pytree, batch first."""


@pytree
@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` found.

    Attributes:
        tokens: `[B, max_length]` int32, without the first token; the end token is included, `pad_token` follows.
        length: tokens of each row `[B]`, the end token counted.
        log_probability: of those tokens `[B]`, float32, in nats: the model's own, whatever chose them. Only the tokens
            of a `ForcedPrefix` of `PrefixCost.NOTHING` count 0.
        ended: `[B]`, whether the row reached its end token.
        failed: `[B]`, whether the row met logits with NaN or inf, or of -inf alone, be it that processors forbid all
            that the model allows; it stops before that token.
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
    """The next token again and again, until every row has ended: the most probable one, or one at random.

    One `lax.while_loop`; of equal logits the lowest token is taken. It knows no model: any pure step function decodes.
    Outside `jit` every call compiles the loop anew, so decode many batches by a jitted function of your own:
    `jax.jit(lambda model, memory, first: generate(model.step, model.start(memory, 50), first, max_length=50, ...))`.

    Args:
        step: `step(tokens [B], state) -> (logits [B, V], state)`.
        state: any pytree, batch first.
        first_token: the token `[B]` that is fed first.
        max_length: most tokens of a row, the end token counted.
        end_token: ends a row.
        pad_token: fills a row behind its end.
        processors: change the float32 logits in this order: penalties, bans, prefixes.
        row_limit: most tokens, one number or one for each row `[B]`, integers from 1 to `max_length`, which is the size
            of the result. A row finds what it finds alone with that `max_length`. Traced values are clipped to this
            range.
        sampling: `Greedy()`, or `Sample((Temperature(0.7), TopP(0.9)))`, whose filters come behind the processors.
        key: for `Sample`, one random key, or one for each row `[B]`. A row's tokens depend on its own key and logits
            alone: one key is folded with the index of the row, see `row_keys`, and that with the index of the step.

    Raises:
        TypeError: the key is no random key.
        ValueError: `max_length` is below 1, or `row_limit` is not from 1 to it; end and pad token are the same: a row
            could not be told from padding; the end token is not in the vocabulary; `sampling` needs a key and there is
            none, or not one for each row; the logits are not `[B, V]`.

    A user's own step function, which counts down from 3:

    >>> def step(tokens, state):
    ...     return 9 * jax.nn.one_hot(tokens - 1, 5), state
    >>> found = generate(step, (), jnp.array([4, 2]), max_length=6, end_token=1)
    >>> print(found.tokens, found.length)
    [[3 2 1 0 0 0]
     [1 0 0 0 0 0]] [3 1]

    It may not say 2, and of 0 and 4, which are as good as 1 then, it takes the lowest:

    >>> from seqattn.decoding import Banned, Sample, Temperature, TopK
    >>> print(generate(step, (), jnp.array([4]), max_length=4, end_token=1, processors=(Banned((2,)),)).tokens)
    [[3 0 0 0]]

    Drawn at random, bold enough to stray from the count:

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
    processors = (*checked_processors(processors), *sampling.filters)

    def unfinished(loop: tuple[Array, Array, Any, Generated]) -> Array:
        found = loop[-1]
        return ~jnp.all(_is_over(found, limit))

    def advance(loop: tuple[Array, Array, Any, Generated]) -> tuple[Array, Array, Any, Generated]:
        index, tokens, state, found = loop
        logits, state = step(tokens, state)
        check_logits(logits, first_token.shape[0], end_token)
        logits = logits.astype(jnp.float32)
        history = History(found.tokens[:, None], index, first_token[:, None])
        allowed = process(processors, logits[:, None], history)[:, 0]
        chosen = sampling.choose(allowed, _step_keys(keys, index))
        # Not finite where a logit is NaN or inf, or where all are -inf; a processor may hide what the model said.
        normaliser = Normaliser.of(logits)
        works = normaliser.is_finite & Normaliser.of(allowed).is_finite if processors else normaliser.is_finite
        gained = normaliser.log_probabilities(jnp.take_along_axis(logits, chosen[:, None], axis=-1))[:, 0]
        gained = _without_free(gained, processors, history)
        tokens, found = _extend(found, chosen, gained, ~works, index, limit, end_token, pad_token)
        return index + 1, tokens, state, found

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
    if not sampling.random:
        return None
    if key is None:
        raise ValueError(f"{type(sampling).__name__} needs a key: generate(..., key=jax.random.key(0))")
    return row_keys(key, num_rows)


def _step_keys(keys: Key[Array, "B"] | None, index: Int[Array, ""]) -> Key[Array, "B"] | None:
    return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)


def _is_over(found: Generated, limit: Int[Array, "B"]) -> Bool[Array, "B"]:
    return found.ended | found.failed | (found.length >= limit)


def _without_free(
    gained: Float[Array, "B"], processors: Sequence[LogitsProcessor], history: History
) -> Float[Array, "B"]:
    for processor in processors:
        if isinstance(processor, ForcedPrefix):
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
    """The next token of each row, and what was found with it."""
    running = ~_is_over(found, limit)
    failed = found.failed | (broken & running)
    running = running & ~broken
    token = jnp.where(running, chosen, pad_token)
    return token, Generated(
        tokens=found.tokens.at[:, index].set(token),
        length=found.length + running.astype(jnp.int32),
        log_probability=found.log_probability + jnp.where(running, gained, 0.0),
        ended=found.ended | (running & (token == end_token)),
        failed=failed,
    )
