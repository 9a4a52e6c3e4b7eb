"""The tiled kernel as a function that JAX can differentiate once. The contract is that of `reference`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqattn.kernels.call import Call, Result, refuse_unknown
from seqattn.kernels.chunked.backward import backward, with_gradients
from seqattn.kernels.chunked.plan import Leaves, Plan, is_floating, prepare
from seqattn.kernels.chunked.tile_loop import absorb, finish, lse_of, start
from seqattn.kernels.mesh_axes import varying


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, for a call that `attend` cannot serve."""
    refuse_unknown("a grid of tiles", call.query.shape, call.key.shape)
    if call.value.shape[-1] == 0:
        raise NotImplementedError("a value dim of 0 leaves nothing to add up in tiles")


def attend(call: Call) -> Result:
    """The output and the log-sum-exp of the logits, as `reference.attend`.

    Reverse mode only: forward-mode and second derivatives are refused; `implementation="reference"` has them. Forward
    mode of a call that an outer `jax.jit` has traced meets JAX's own TypeError ("can't apply forward-mode autodiff"),
    as JAX differentiates that program when this function has long returned.
    """
    refuse(call)
    if call.is_empty:
        return call.nothing()
    plan, leaves = prepare(call)
    try:
        return _attend(plan, varying(leaves, leaves))
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise NotImplementedError("forward-mode derivatives of attention are only known to 'reference'") from error


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, leaves: Leaves) -> tuple[Array, Array]:
    output, peak, log_total = _results(plan, leaves)
    return output, lse_of(peak, log_total)


def _forward(plan: Plan, leaves: Leaves) -> tuple[tuple[Array, Array], tuple]:
    output, peak, log_total = _results(plan, leaves)
    return (output, lse_of(peak, log_total)), (leaves, output, peak, log_total)


def _backward(plan: Plan, residuals: tuple, directions: tuple) -> tuple[list[Array | np.ndarray]]:
    leaves, *results = residuals
    gradients = iter(_gradients(plan, leaves, *results, *directions))
    return ([next(gradients) if is_floating(x) else np.zeros(jnp.shape(x), jax.dtypes.float0) for x in leaves],)


@functools.partial(jax.jit, static_argnums=0)
def _results(plan: Plan, leaves: Leaves) -> tuple[Array, Array, Array]:
    return finish(plan, leaves, absorb(plan, leaves, start(plan, leaves)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    plan: Plan, leaves: Leaves, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> list[Array]:
    """The gradients by all floating leaves of the call."""
    call = plan.call(leaves)
    gradients = backward(plan, leaves, output, peak, log_total, d_output, d_lse)
    everything = jax.tree.leaves(with_gradients(call, gradients))
    return [d.astype(x.dtype) for d, x in zip(everything, leaves, strict=True) if is_floating(x)]


def _refuse_second(plan: Plan, *residuals: Any) -> Any:
    raise NotImplementedError("second derivatives of attention are only known to 'reference'")


_attend.defvjp(_forward, _backward)
_gradients.defvjp(_refuse_second, _refuse_second)
