"""Online softmax over the tiles that a mask reaches (Milakov 2018; Rabe 2021).

Scores are laid out `[lanes, keys, group * queries]`, keys before queries. Maxima and sums then run over the slow axis
in whole vectors, and no product needs a transposed operand: twice as fast on the CPU as queries before keys. Query
heads that share a key head are adjacent columns, so keys are never repeated.
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
from seqattn.kernels.log_total import SEES_NOTHING
from seqattn.kernels.mesh_axes import varying
from seqattn.precision import lowest

Carry = Any
"""A pytree of arrays that the loop over tiles updates in place."""

State = tuple[Array, Array, Array]
"""The accumulators of the online softmax, in the layout of tiles: output sums, largest logits and totals."""


def start(plan: Plan, leaves: Leaves) -> State:
    """Returns the accumulators of a call before any key: zero sums, the lowest maximum and zero totals."""
    call, grid = plan.call(leaves), plan.grid
    high = call.high
    shape = (grid.counts[1], grid.batch * grid.num_kv_heads)
    columns = grid.group * grid.queries
    # The maximum starts at the lowest finite number instead of -inf: -inf - -inf would be NaN in the first update.
    return (
        jnp.zeros((*shape, call.value.shape[-1], columns), high),
        jnp.full((*shape, columns), lowest(high), high),
        jnp.zeros((*shape, columns), high),
    )


def absorb(plan: Plan, leaves: Leaves, state: State) -> State:
    """Returns the accumulators after the keys of a call.

    The state may already hold the keys of other calls with the same grid and the same queries, as in the ring.
    """
    call = plan.call(leaves)
    grid, given = plan.grid, operands.of_output(plan.grid, call)

    def step(carry: Carry, at: At, partial: bool) -> Carry:
        place = Place(grid, call, given, at, partial)
        # Only the accumulators of the visited query tile leave the carry: the loop updates slices in place.
        output, peak, total = (layouts.take(grid, x, at[1], at[0]) for x in carry)
        scores = TileScores.of(place, gradients=False).values
        # The running maximum of Milakov 2018, algorithm 3: m_j = max(m_{j-1}, x_j).
        top = jnp.maximum(peak, scores.max(axis=1))
        # Without the barrier XLA fuses the exponentials into both consumers and computes them twice.
        weights = lax.optimization_barrier(jnp.exp(scores - top[:, None]))
        # Sums under the old maximum are rescaled to the new one: d_j = d_{j-1} * exp(m_{j-1} - m_j) + ...
        shrink = jnp.exp(peak - top)
        total = total * shrink + weights.sum(axis=1)
        # Dropout acts on the weights after the softmax: the total above keeps the dropped ones. The product runs in the
        # dtype of the values, as in FlashAttention; its sum is accumulated in float32 or wider.
        weights = dropped(plan, place, weights).astype(call.value.dtype)
        output = output * shrink[:, None] + product("lvs,lst->lvt", place.key_columns("value"), weights, call.high)
        return tuple(
            layouts.put(grid, x, new, at[1], at[0]) for x, new in zip(carry, (output, top, total), strict=True)
        )

    # The order of tiles does not change the result, up to rounding: the update is associative.
    return visit(call, step, state)


def finish(plan: Plan, leaves: Leaves, state: State) -> tuple[Array, Array, Array]:
    """Returns the output, the largest logit of each row and the log of the sum of `exp(logit - largest)`.

    The two parts of the log-sum-exp stay separate, because their sum would lose the small part if logits are huge. A
    fully masked row has the largest logit `lowest` and the log `SEES_NOTHING`, which no other row has.
    """
    call, grid = plan.call(leaves), plan.grid
    output, peak, total = state
    # A visible logit adds exp(0) = 1 at the maximum, so only fully masked rows have a total of 0.
    empty = total == 0
    # Dividing 0 by 1 gives these rows zeros, with zero gradients and without a NaN for `jax.debug_nans`.
    total = jnp.where(empty, jnp.ones_like(total), total)
    log_total = jnp.where(empty, SEES_NOTHING, jnp.log(total))
    # One division at the end instead of one in each step (Dao 2023, section 3.1).
    output = layouts.from_columns(grid, output / total[:, :, None]).astype(call.query.dtype)
    peak, log_total = (layouts.from_columns(grid, x[:, :, None])[..., 0] for x in (peak, log_total))
    return output, peak, log_total


def visit(call: TiledCall, step: Callable[..., Carry], carry: Carry) -> Carry:
    """Returns the carry after each tile of the schedule: first the full tiles, then the partial ones."""
    # Inside `jax.shard_map` the carry must vary over the same mesh axes as the tiles added to it.
    carry, schedule = varying(carry, call), call.schedule
    # Two loops instead of a branch in one: the body of the full tiles then contains no mask at all.
    for steps, partial in ((schedule.full, False), (schedule.partial, True)):
        number = steps.size
        # A loop of one step would still cost its set-up and keep XLA from fusing the step with its surroundings.
        if number == 1 and steps.count is None:
            carry = step(carry, jnp.asarray(steps.at[0]), partial)
        elif number:
            carry = _loop(steps, functools.partial(step, partial=partial), carry)
    return carry


def _loop(steps: Steps, step: Callable[[Carry, Array], Carry], carry: Carry) -> Carry:
    """Runs `step` on each scheduled tile."""
    count = steps.size if steps.count is None else steps.count
    # A traced count makes a while loop. Tiles after the count are listed but never computed.
    return lax.fori_loop(0, count, lambda n, carry: step(carry, jnp.asarray(steps.at)[n]), carry)
