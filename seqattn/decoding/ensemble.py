"""Several models as one step function."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqattn.decoding.generate import Step


class Average(enum.Enum):
    """What of the members is averaged: their probabilities, or the logarithms of these (the geometric mean)."""

    PROBABILITY = "probability"
    LOG_PROBABILITY = "log_probability"


def ensemble(*steps: Step, average: Average = Average.PROBABILITY) -> Step:
    """A step function over a tuple of states, one for each member; it decodes like any other.

    All members are fed the same tokens and share one vocabulary. Its logits are the logarithm of the mean, float32. By
    the mean of probabilities, as in fairseq, a token is possible where one member allows it; by the geometric mean
    where all do. A member that fails by NaN or +inf, or by -inf everywhere, gives NaN: it is not averaged away.

    Args:
        steps: `step(tokens [B], state) -> (logits [B, V], state)` of each member.
        average: which mean.

    Raises:
        ValueError: there is no member; when called, states are not one for each, or vocabularies differ in size.

    >>> sure = lambda tokens, state: (jnp.log(jnp.array([[1.0, 0.0]])), state)
    >>> torn = lambda tokens, state: (jnp.log(jnp.array([[0.5, 0.5]])), state)
    >>> logits, states = ensemble(sure, torn)(jnp.array([0]), ((), ()))
    >>> print(jnp.exp(logits))
    [[0.75 0.25]]
    """
    if not steps:
        raise ValueError("an ensemble needs at least one step function")

    def step(tokens: Int[Array, "B"], states: Any) -> tuple[Float[Array, "B V"], Any]:
        if not isinstance(states, (tuple, list)) or len(states) != len(steps):
            raise ValueError(f"the state of this ensemble must be a tuple of {len(steps)} states, one for each member")
        results = [member(tokens, state) for member, state in zip(steps, states, strict=True)]
        return _mean([logits for logits, _ in results], average), tuple(state for _, state in results)

    return step


def _mean(members: list[Array], average: Average) -> Float[Array, "B V"]:
    shapes = [logits.shape for logits in members]
    if len(set(shapes)) > 1:
        raise ValueError(f"the members of an ensemble must share one vocabulary, got logits {shapes}")
    log_probabilities = jnp.stack([jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) for logits in members])
    if average is Average.LOG_PROBABILITY:
        return log_probabilities.mean(axis=0)
    return jax.nn.logsumexp(log_probabilities, axis=0) - jnp.log(jnp.float32(len(members)))
