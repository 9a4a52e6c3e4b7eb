"""An ensemble of models as one step function."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqattn.decoding.generate import Step


class Average(enum.Enum):
    """What an ensemble averages: the probabilities, or their logarithms (the geometric mean)."""

    PROBABILITY = "probability"
    LOG_PROBABILITY = "log_probability"


def ensemble(*steps: Step, average: Average = Average.PROBABILITY) -> Step:
    """Returns a step function over a tuple of states, one per member.

    Decodes like any other step function. All members are fed the same tokens and share one vocabulary. The logits are
    the logarithm of the mean, float32. With the mean of probabilities, as in fairseq, a token is possible if one member
    allows it; with the geometric mean, only if all members do. A member that fails, by NaN or +inf or by -inf for all
    tokens, makes the result NaN, so that the search notices.

    Args:
        steps: the members, each `step(tokens [B], state) -> (logits [B, V], state)`.
        average: which mean. Defaults to the mean of probabilities.

    Returns:
        `step(tokens [B], states) -> (logits [B, V], states)`.

    Raises:
        ValueError: there are no members. When called: there is not one state per member, or vocabulary sizes differ.

    >>> sure = lambda tokens, state: (jnp.log(jnp.array([[1.0, 0.0]])), state)
    >>> torn = lambda tokens, state: (jnp.log(jnp.array([[0.5, 0.5]])), state)
    >>> logits, states = ensemble(sure, torn)(jnp.array([0]), ((), ()))
    >>> print(jnp.exp(logits))
    [[0.75 0.25]]
    """
    if not steps:
        raise ValueError("an ensemble needs at least one step function")

    def step(tokens: Int[Array, "B"], states: Any) -> tuple[Float[Array, "B V"], Any]:
        # A missing state would otherwise surface inside some member.
        if not isinstance(states, (tuple, list)) or len(states) != len(steps):
            raise ValueError(f"the state of this ensemble must be a tuple of {len(steps)} states, one for each member")
        results = [member(tokens, state) for member, state in zip(steps, states, strict=True)]
        return _mean([logits for logits, _ in results], average), tuple(state for _, state in results)

    return step


def _mean(members: list[Array], average: Average) -> Float[Array, "B V"]:
    shapes = [logits.shape for logits in members]
    if len(set(shapes)) > 1:
        raise ValueError(f"the members of an ensemble must share one vocabulary, got logits {shapes}")
    # Normalise before averaging: members may have logits on different scales, and the one with the largest would
    # dominate. In float32, since bfloat16 cannot tell close candidates apart.
    log_probabilities = jnp.stack([jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) for logits in members])
    if average is Average.LOG_PROBABILITY:
        # Not normalised again. The search normalises what it is given.
        return log_probabilities.mean(axis=0)
    # Stays in log space: probabilities of long tails underflow.
    return jax.nn.logsumexp(log_probabilities, axis=0) - jnp.log(jnp.float32(len(members)))
