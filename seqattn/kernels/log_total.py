"""The log-sum-exp in two parts: the largest logit of a row, and the log of the sum of `exp(logit - largest)`.

Kernels keep the parts apart, because their sum would lose the small part if logits are huge.
"""

from jaxtyping import Array

from seqattn.kernels.reference import log_sum_exp

SEES_NOTHING = -1e30
"""Marks the log of the total of a fully masked row. All other values are about 0 or more; adding `lowest` is exact."""


def lse_of(peak: Array, log_total: Array) -> Array:
    """Returns the log-sum-exp from its two parts."""
    return log_sum_exp(peak + log_total, log_total == SEES_NOTHING)
