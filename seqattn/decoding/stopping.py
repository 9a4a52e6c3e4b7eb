"""Stopping rules of beam search: when a row is done although live hypotheses remain."""

import enum

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqattn.decoding.penalties import LengthPenalty


class Stopping(enum.Enum):
    """When a row is done although live hypotheses remain.

    Every rule first waits until `beam_size` sequences have finished. In diverse beam search the rule applies to each
    group, with the group size as the count.
    """

    FIRST = "first"
    """Stops as soon as enough sequences have finished (`early_stopping=True` in Hugging Face)."""
    LIKELY = "likely"
    """Stops when the best live hypothesis, scored at its present length, scores no better than the worst finished one
    (`early_stopping=False` in Hugging Face).
    """
    EXACT = "exact"
    """Stops when no live hypothesis can still score better than the worst finished one (`early_stopping="never"` in
    Hugging Face).

    Holds for any length penalty and any processors: `LengthPenalty.bound` covers all lengths a hypothesis may reach,
    and `LogitsProcessor.bound` says how much a processor can add per token. If a processor does not know its bound, a
    row continues until its hypotheses have ended or reached their limit.
    """


def reachable(
    penalty: LengthPenalty,
    log_probability: Float[Array, "B G"],
    length: Int[Array, ""],
    max_length: int,
    *,
    limit: Int[Array, "B"],
    gain: Float[Array, "B"],
) -> Float[Array, "B G"]:
    """Returns the best score that hypotheses of `length` tokens can still reach, `[B, G]`.

    Args:
        penalty: computes scores.
        log_probability: of the best live hypothesis of each group, in nats.
        length: tokens of the live hypotheses.
        max_length: maximum number of tokens of any sequence.
        limit: maximum number of tokens of each row.
        gain: the most that one token can add to a log probability; inf if unknown, and so is the result.
    """
    # Penalties need not handle infinities, such as inf - inf for a dead group: compute with a gain of 0, then restore
    # inf.
    is_known = jnp.isfinite(gain)[:, None]
    finite = jnp.where(is_known, gain[:, None], 0.0)
    bound = penalty.bound(log_probability, length, max_length, limit=limit[:, None], gain=finite)
    return jnp.where(is_known, bound, jnp.inf)
