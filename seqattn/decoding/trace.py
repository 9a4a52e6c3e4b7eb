"""A record of the choices of a beam search, and the backtracking that recovers sequences from it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from seqattn.pytrees import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Trace:
    """The choices of each step. Written once at the index of the step, never moved when hypotheses are reordered.

    Attributes:
        token: `[L, B, beams]` int32, the token that hypothesis j chose at each step.
        parent: `[L, B, beams]` int32, the index that hypothesis j had before that step.
        alignment: `[L, B, beams, S]` float32, the attention weights of the hypotheses in their order before that step;
            or None.
    """

    token: Int[Array, "*L B beams"]
    parent: Int[Array, "*L B beams"]
    alignment: Float[Array, "*L B beams S"] | None

    def write(self, step: "Trace", index: Int[Array, ""]) -> "Trace":
        """Writes a trace of one step, without the axis L, at this index."""
        # Storing parents makes a step cost O(beams). Moving whole sequences at each reordering costs O(beams * L).
        return jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, index, axis=0), self, step)

    def walk_back(
        self, last: Int[Array, "B N"], parent: Int[Array, "B N"], length: Int[Array, "B N"], pad_token: int
    ) -> tuple[Int[Array, "B N L"], Float[Array, "B N L S"] | None]:
        """Recovers sequences by following parents from the last token to the first.

        Args:
            last: the last token of each sequence.
            parent: the hypothesis that chose it.
            length: tokens of each sequence.
            pad_token: fills the places from `length` on.

        Returns:
            The tokens `[B, N, L]`, and the alignments `[B, N, L, S]` or None.
        """

        def walk(place: Array, step: tuple[Array, Trace]) -> tuple[Array, tuple[Array, Array | None]]:
            index, chosen = step
            # Sequences end at different steps, so each joins the walk at its own last step.
            is_last, inside = index == length - 1, index < length
            # The last token is not in the trace: the finished candidate gave its place in the beam to another one.
            token = jnp.where(is_last, last, of_hypotheses(chosen.token, place))
            place = jnp.where(is_last, parent, of_hypotheses(chosen.parent, place))
            weights = None
            # Weights are stored in the order before the step, so they are read after the move to the parent.
            if chosen.alignment is not None:
                weights = jnp.where(inside[..., None], of_hypotheses(chosen.alignment, place), 0.0)
            return place, (jnp.where(inside, token, pad_token), weights)

        steps = (jnp.arange(len(self.token)), self)
        # In reverse: a hypothesis knows its parent, and a parent may have several children.
        _, found = jax.lax.scan(walk, jnp.zeros_like(parent), steps, reverse=True)
        tokens, alignment = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 2), found)
        return tokens, alignment


def of_hypotheses(values: Shaped[Array, "B beams *X"], which: Int[Array, "B N"]) -> Shaped[Array, "B N *X"]:
    """Selects the entries of these hypotheses in each row."""
    places = which.reshape(*which.shape, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, places, axis=1, mode="promise_in_bounds")
