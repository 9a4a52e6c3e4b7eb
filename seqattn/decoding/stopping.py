"""When a beam search has found what a row offers, although some of its hypotheses could go on."""

import enum

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqattn.decoding.penalties import LengthPenalty


class Stopping(enum.Enum):
    """When a row is done although some of its hypotheses could go on. In every case `beam_size` have ended by then."""

    FIRST = "first"
    """At once: Hugging Face's `early_stopping=True`."""
    LIKELY = "likely"
    """When the best running one, at its present length, scores no more than the worst ended one: `False` there."""
    EXACT = "exact"
    """When no running one can still score more than the worst ended one: `"never"` there.

    This holds for any length penalty, and for any processors: each says by `LogitsProcessor.bound` how much it can add.
    Where one does not say, a row goes on until its hypotheses have ended or reached their limit.
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
    """The best score that can still come of hypotheses of `length` tokens.

    It is inf where `gain` is, the most that a step adds to a log probability.
    """
    is_known = jnp.isfinite(gain)[:, None]
    finite = jnp.where(is_known, gain[:, None], 0.0)
    bound = penalty.bound(log_probability, length, max_length, limit=limit[:, None], gain=finite)
    return jnp.where(is_known, bound, jnp.inf)
