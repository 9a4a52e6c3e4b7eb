"""The tiled kernel as a function with a custom derivative rule. Its contract is that of `reference`."""

import functools

import jax
import numpy as np
from jaxtyping import Array

from seqattn.kernels.call import Call, Result, refuse_unknown
from seqattn.kernels.chunked.backward import backward, with_gradients
from seqattn.kernels.chunked.plan import Leaves, Plan, prepare
from seqattn.kernels.chunked.tile_loop import absorb, finish, start
from seqattn.kernels.log_total import lse_of
from seqattn.kernels.mesh_axes import varying
from seqattn.kernels.no_gradient import is_floating, no_gradient, refuse_second


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call."""
    refuse_unknown("a grid of tiles", call.query.shape, call.key.shape)
    if call.value.shape[-1] == 0:
        raise NotImplementedError("tiles need a value dim of at least 1, got 0")


def attend(call: Call) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`.

    Supports reverse mode only. Raises NotImplementedError for forward mode and second derivatives, which
    `implementation="reference"` supports. If an outer `jax.jit` has already traced the call, forward mode raises JAX's
    own TypeError ("can't apply forward-mode autodiff"): JAX then differentiates the traced program, after this function
    has returned.
    """
    refuse(call)
    if call.is_empty:
        return call.nothing()
    # JAX sees the leaves, and `plan` is hashable and static: equal calls share one compiled program.
    plan, leaves = prepare(call)
    try:
        return _attend(plan, varying(leaves, leaves))
    except TypeError as error:
        # JAX reports forward mode only by the text of its TypeError.
        if "forward-mode" not in str(error):
            raise
        raise NotImplementedError("forward-mode derivatives of attention are only supported by 'reference'") from error


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
