"""The tiled kernel as a function with a custom derivative rule. Its contract is that of `reference`."""

import functools

import jax
import numpy as np
from jaxtyping import Array

from seqattn.kernels.blocks import visits
from seqattn.kernels.call import Call, Result, refuse_unknown
from seqattn.kernels.chunked import schedule
from seqattn.kernels.chunked.backward import backward, with_gradients
from seqattn.kernels.chunked.plan import Leaves, Plan, prepare, shape_of
from seqattn.kernels.chunked.tile_loop import absorb, finish, start
from seqattn.kernels.log_total import lse_of
from seqattn.kernels.mesh_axes import varying
from seqattn.kernels.no_gradient import is_floating, no_gradient, refuse_second
from seqattn.kernels.reverse_mode import reverse_only
from seqattn.mask import Mask

_MOST_BLOCKS = 2**22
"""Blocks up to which `note` plans the tiles of a call."""


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call."""
    refuse_unknown("a grid of tiles", call.query.shape, call.key.shape)
    if call.value.shape[-1] == 0:
        raise NotImplementedError("tiles need a value dim of at least 1, got 0")


def note(call: Call) -> str | None:
    """Returns the note for `explain` on the tiles that the kernel visits; None if it would take long to list them."""
    if call.is_empty or (call.mask is not None and not isinstance(call.mask, Mask)):
        return None
    if schedule.size(shape_of(call)) > _MOST_BLOCKS:
        return None
    plan, leaves = prepare(call)
    grid, tiles = plan.grid, plan.call(leaves).schedule
    lanes, queries, _ = grid.counts
    counts = [steps.size if steps.count is None else steps.count for steps in (tiles.full, tiles.partial)]
    number = None if any(isinstance(n, jax.core.Tracer) for n in counts) else sum(map(int, counts))
    return visits(number, lanes * queries * -(-grid.size // grid.keys), grid.queries, grid.keys)


def attend(call: Call) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`.

    Supports reverse mode only. Raises NotImplementedError for forward mode and second derivatives, which
    `implementation="reference"` supports. If an outer `jax.jit` has already traced the call, forward mode raises JAX's
    own TypeError ("can't apply forward-mode autodiff"); see `reverse_only`.
    """
    refuse(call)
    if call.is_empty:
        return call.nothing()
    # JAX sees the leaves, and `plan` is hashable and static: equal calls share one compiled program.
    plan, leaves = prepare(call)
    with reverse_only():
        return _attend(plan, varying(leaves, leaves))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, leaves: Leaves) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; the custom derivative rules are attached below."""
    output, peak, log_total = _results(plan, leaves)
    return output, lse_of(peak, log_total)


def _forward(plan: Plan, leaves: Leaves) -> tuple[tuple[Array, Array], tuple]:
    """Returns the results, and the residuals for the backward pass: O(T + S) numbers, no scores."""
    # The two parts of the log-sum-exp are kept apart, as the backward pass subtracts them one by one.
    output, peak, log_total = _results(plan, leaves)
    return (output, lse_of(peak, log_total)), (leaves, output, peak, log_total)


def _backward(plan: Plan, residuals: tuple, directions: tuple) -> tuple[list[Array | np.ndarray]]:
    """Returns the gradients of the leaves; integer leaves have the gradient dtype `float0`."""
    leaves, *results = residuals
    gradients = iter(gradients_of(plan, leaves, *results, *directions))
    return ([next(gradients) if is_floating(x) else no_gradient(x) for x in leaves],)


@functools.partial(jax.jit, static_argnums=0)
def _results(plan: Plan, leaves: Leaves) -> tuple[Array, Array, Array]:
    """Runs the forward pass, compiled once for each plan and set of shapes."""
    return finish(plan, leaves, absorb(plan, leaves, start(plan, leaves)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def gradients_of(
    plan: Plan, leaves: Leaves, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> list[Array]:
    """Returns the gradients with respect to all floating leaves of the call."""
    call = plan.call(leaves)
    gradients = backward(plan, leaves, output, peak, log_total, d_output, d_lse)
    everything = jax.tree.leaves(with_gradients(call, gradients))
    return [d.astype(x.dtype) for d, x in zip(everything, leaves, strict=True) if is_floating(x)]


_attend.defvjp(_forward, _backward)
# Second derivatives would differentiate the loop over tiles and store the scores of each one, so they are refused.
gradients_of.defvjp(refuse_second, refuse_second)
