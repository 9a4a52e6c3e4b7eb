"""What a beam search chose, step by step, and the way back from the end of a hypothesis to its first token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from seqattn.pytrees import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Trace:
    """What each step chose: written once, at the index of the step, and never moved when hypotheses are reordered.

    Attributes:
        token: `[L, B, beams]`, what hypothesis j said in each step.
        parent: `[L, B, beams]`, which hypothesis it was before that step.
        alignment: `[L, B, beams, S]`, what the hypotheses attended to, as they were before that step; or None.
    """

    token: Int[Array, "*L B beams"]
    parent: Int[Array, "*L B beams"]
    alignment: Float[Array, "*L B beams S"] | None

    def write(self, step: "Trace", index: Int[Array, ""]) -> "Trace":
        """With a trace of one step, without the axis L, at this index."""
        return jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, index, axis=0), self, step)

    def walk_back(
        self, last: Int[Array, "B N"], parent: Int[Array, "B N"], length: Int[Array, "B N"], pad_token: int
    ) -> tuple[Int[Array, "B N L"], Float[Array, "B N L S"] | None]:
        """The tokens and alignments of sequences of `length` tokens, of which hypothesis `parent` said the last one."""

        def walk(place: Array, step: tuple[Array, Trace]) -> tuple[Array, tuple[Array, Array | None]]:
            index, chosen = step
            is_last, inside = index == length - 1, index < length
            token = jnp.where(is_last, last, of_hypotheses(chosen.token, place))
            place = jnp.where(is_last, parent, of_hypotheses(chosen.parent, place))
            weights = None
            if chosen.alignment is not None:
                weights = jnp.where(inside[..., None], of_hypotheses(chosen.alignment, place), 0.0)
            return place, (jnp.where(inside, token, pad_token), weights)

        steps = (jnp.arange(len(self.token)), self)
        _, found = jax.lax.scan(walk, jnp.zeros_like(parent), steps, reverse=True)
        tokens, alignment = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 2), found)
        return tokens, alignment


def of_hypotheses(values: Shaped[Array, "B beams *X"], which: Int[Array, "B N"]) -> Shaped[Array, "B N *X"]:
    """What belongs to these hypotheses of each row."""
    places = which.reshape(*which.shape, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, places, axis=1, mode="promise_in_bounds")
