"""The arithmetic of a tile of the backward pass (Dao 2023, algorithm 2), in either order of queries and keys."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from seqattn.kernels.hopper.operations import LOG2_E
from seqattn.kernels.hopper.tile import Arithmetic, Place


class Weights(NamedTuple):
    """What is known of the weights of a tile.

    Attributes:
        plain: the weights.
        kept: the weights after dropout.
        slope: the derivative of the score modification, or None without one.
    """

    plain: Array
    kept: Array
    slope: Array | None


@dataclasses.dataclass(frozen=True)
class Gradients(Arithmetic):
    """The functions of a call."""

    def recomputed(
        self, products: Float[Array, "R C"], peak: Any, log_total: Any, place: Place, *, partial: bool
    ) -> Weights:
        """Returns the weights of a tile, from the two parts of the log-sum-exp.

        Args:
            products: the products of queries and keys.
            peak: the largest logits, over the tile.
            log_total: the logs of the totals, over the tile.
            place: where the tile is.
            partial: whether a pair in the tile may be masked.
        """
        scores, slope, backward = products * self.scale, None, self.plan.backward
        if backward is not None and (mod := backward.score_mod) is not None:
            scores, slope = self._evaluate(mod, self.given.mod, (scores,), place, scores.shape)
        if partial and (visible := self._visible(place, scores.shape)) is not None:
            scores = jnp.where(visible, scores, -jnp.inf)
        # P = exp(S - L), line 11. Subtracting the two parts of L one by one keeps the small part exact.
        weights = jnp.exp2((scores - peak - log_total) * jnp.float32(LOG2_E))
        if partial or slope is not None:
            # Exact zeros: in a NaN row the exponentials of hidden pairs are NaN too, which must reach no masked key.
            weights = jnp.where(scores == -jnp.inf, jnp.zeros_like(weights), weights)
        return Weights(weights, self.dropped(weights, place), slope)

    def d_products(self, weights: Weights, d_weights: Array, delta: Array, *, partial: bool) -> Array:
        """Returns the gradients of the scaled products, from those of the weights after dropout."""
        # The derivative of the softmax, line 14: dS = P * (dP - D). Dropout scales dP as it scales P.
        if self.plan.dropout_rate == 0:
            gradients = weights.plain * (d_weights - delta)
        else:
            gradients = weights.kept * d_weights - weights.plain * delta
        if weights.slope is not None:
            gradients = gradients * weights.slope
        if partial or weights.slope is not None:
            # Where a weight is 0 the gradient is 0 as well. The derivative of a modification may be NaN there, and D.
            gradients = jnp.where(weights.plain == 0, jnp.zeros_like(gradients), gradients)
        return gradients
