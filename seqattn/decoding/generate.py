"""From a step function to sequences: greedy generation in one jitted loop."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Step = Callable[[Array, Any], tuple[Array, Any]]
"""`step(tokens [B], state) -> (logits [B, V], state)`; the state is any pytree, batch first."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` found.

    Attributes:
        tokens: `[B, max_length]` int32, without the first token; the end token is included, `pad_token` follows.
        length: tokens of each row `[B]`, the end token counted.
        log_probability: of those tokens `[B]`, float32, in nats.
        ended: `[B]`, whether the row reached its end token.
        failed: `[B]`, whether the row met logits with NaN or inf, or of -inf alone; it stops before that token.
    """

    tokens: Int[Array, "B L"]
    length: Int[Array, "B"]
    log_probability: Float[Array, "B"]
    ended: Bool[Array, "B"]
    failed: Bool[Array, "B"]


def generate(
    step: Step, state: Any, first_token: Int[Array, "B"], *, max_length: int, end_token: int, pad_token: int = 0
) -> Generated:
    """Greedy decoding: the most probable next token, until every row has ended.

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

    Raises:
        ValueError: `max_length` is below 1, or end and pad token are the same: a row could not be told from padding.

    A user's own step function, which counts down from 3:

    >>> def step(tokens, state):
    ...     return jax.nn.one_hot(tokens - 1, 5), state
    >>> found = generate(step, (), jnp.array([4, 2]), max_length=6, end_token=1)
    >>> print(found.tokens, found.length)
    [[3 2 1 0 0 0]
     [1 0 0 0 0 0]] [3 1]
    """
    if max_length < 1:
        raise ValueError(f"max_length ({max_length}) must be at least 1")
    if end_token == pad_token:
        raise ValueError(f"end_token and pad_token must differ, both are {end_token}")
    first_token = jnp.asarray(first_token, jnp.int32)
    batch = first_token.shape
    start = Generated(
        tokens=jnp.full((*batch, max_length), pad_token, jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
        log_probability=jnp.zeros(batch, jnp.float32),
        ended=jnp.zeros(batch, bool),
        failed=jnp.zeros(batch, bool),
    )

    def unfinished(loop: tuple[Array, Array, Any, Generated]) -> Array:
        index, _, _, found = loop
        return (index < max_length) & ~jnp.all(found.ended | found.failed)

    def advance(loop: tuple[Array, Array, Any, Generated]) -> tuple[Array, Array, Any, Generated]:
        index, tokens, state, found = loop
        logits, state = step(tokens, state)
        tokens, found = _extend(found, logits, index, end_token, pad_token)
        return index + 1, tokens, state, found

    loop = (jnp.zeros((), jnp.int32), first_token, state, start)
    return jax.lax.while_loop(unfinished, advance, loop)[-1]


def _extend(
    found: Generated, logits: Float[Array, "B V"], index: Int[Array, ""], end_token: int, pad_token: int
) -> tuple[Array, Generated]:
    """The next token of each row, and what was found with it."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    # The largest is NaN where any is NaN, and -inf where all are.
    broken = ~jnp.isfinite(logits.max(axis=-1))
    failed = found.failed | (broken & ~found.ended)
    running = ~(found.ended | failed)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = jnp.where(running, best, pad_token)
    gained = jnp.take_along_axis(log_probabilities, best[:, None], axis=-1)[:, 0]
    return token, Generated(
        tokens=found.tokens.at[:, index].set(token),
        length=found.length + running.astype(jnp.int32),
        log_probability=found.log_probability + jnp.where(running, gained, 0.0),
        ended=found.ended | (running & (token == end_token)),
        failed=failed,
    )
