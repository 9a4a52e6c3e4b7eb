"""An online softmax over the tiles that a mask reaches (Milakov 2018; Rabe 2021): a state that absorbs keys.

Scores are laid out `[lanes, keys, group * queries]`, keys before queries: then maxima and sums run over the slow axis,
in whole vectors, and no product needs a transposed operand (on the CPU twice as fast as queries before keys). Query
heads that share a key head lie side by side as columns, so keys are never repeated.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from seqattn.kernels.chunked import layouts, operands
from seqattn.kernels.chunked.layouts import At
from seqattn.kernels.chunked.plan import Leaves, Plan, TiledCall
from seqattn.kernels.chunked.schedule import Steps
from seqattn.kernels.chunked.tile_scores import Place, TileScores, dropped, product
from seqattn.kernels.mesh_axes import varying
from seqattn.kernels.reference import log_sum_exp
from seqattn.precision import lowest

_EMPTY = -1e30
"""The log of the total of an empty row. Others are about 0 at least, and nothing is lost where `lowest` is added."""

Carry = Any
"""A pytree of arrays that a loop over tiles updates in place."""

State = tuple[Array, Array, Array]
"""What a row knows of the keys that it has seen: sums of values, largest logits and totals, as tiles lie in memory."""


def start(plan: Plan, leaves: Leaves) -> State:
    """The state of the queries of a call before they have seen a key."""
    call, grid = plan.call(leaves), plan.grid
    high = call.high
    shape = (grid.counts[1], grid.batch * grid.num_kv_heads)
    columns = grid.group * grid.queries
    return (
        jnp.zeros((*shape, call.value.shape[-1], columns), high),
        jnp.full((*shape, columns), lowest(high), high),
        jnp.zeros((*shape, columns), high),
    )


def absorb(plan: Plan, leaves: Leaves, state: State) -> State:
    """The state after the keys of a call, too: of those before, other calls of one grid and the same queries tell."""
    call = plan.call(leaves)
    grid, given = plan.grid, operands.of_output(plan.grid, call)

    def step(carry: Carry, at: At, partial: bool) -> Carry:
        place = Place(grid, call, given, at, partial)
        output, peak, total = (layouts.take(grid, x, at[1], at[0]) for x in carry)
        scores = TileScores.of(place, gradients=False).values
        top = jnp.maximum(peak, scores.max(axis=1))
        # Without the barrier the exponentials would be computed twice, for their sum and for the product.
        weights = lax.optimization_barrier(jnp.exp(scores - top[:, None]))
        # What was added up under a smaller maximum shrinks to the new one.
        shrink = jnp.exp(peak - top)
        total = total * shrink + weights.sum(axis=1)
        weights = dropped(plan, place, weights).astype(call.value.dtype)
        output = output * shrink[:, None] + product("lvs,lst->lvt", place.key_columns("value"), weights, call.high)
        return tuple(
            layouts.put(grid, x, new, at[1], at[0]) for x, new in zip(carry, (output, top, total), strict=True)
        )

    return visit(call, step, state)


def finish(plan: Plan, leaves: Leaves, state: State) -> tuple[Array, Array, Array]:
    """The output, the largest logit of each row, and the log of the sum of `exp(logit - largest)`.

    The two parts of the log-sum-exp stay apart: their sum would round the small one away where logits are huge. The
    largest logit of an empty row is `lowest`, and its log is `_EMPTY`, as that of no other row.
    """
    call, grid = plan.call(leaves), plan.grid
    output, peak, total = state
    empty = total == 0
    total = jnp.where(empty, jnp.ones_like(total), total)
    log_total = jnp.where(empty, _EMPTY, jnp.log(total))
    output = layouts.from_columns(grid, output / total[:, :, None]).astype(call.query.dtype)
    peak, log_total = (layouts.from_columns(grid, x[:, :, None])[..., 0] for x in (peak, log_total))
    return output, peak, log_total


def lse_of(peak: Array, log_total: Array) -> Array:
    """The log-sum-exp of what `finish` gives."""
    return log_sum_exp(peak + log_total, log_total == _EMPTY)


def visit(call: TiledCall, step: Callable[..., Carry], carry: Carry) -> Carry:
    """The carry after each tile of the schedule, those first in which every pair may attend."""
    carry, schedule = varying(carry, call), call.schedule
    for steps, partial in ((schedule.full, False), (schedule.partial, True)):
        number = steps.at.shape[0]
        if number == 1 and steps.count is None:
            carry = step(carry, jnp.asarray(steps.at[0]), partial)
        elif number:
            carry = _loop(steps, functools.partial(step, partial=partial), carry)
    return carry


def _loop(steps: Steps, step: Callable[[Carry, Array], Carry], carry: Carry) -> Carry:
    count = steps.at.shape[0] if steps.count is None else steps.count
    return lax.fori_loop(0, count, lambda n, carry: step(carry, jnp.asarray(steps.at)[n]), carry)
