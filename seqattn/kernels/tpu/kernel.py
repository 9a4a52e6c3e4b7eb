"""The TPU kernel as a function with a custom derivative rule. Its contract is that of `reference`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqattn.kernels import blocks
from seqattn.kernels.call import Call, Result, refuse_unknown
from seqattn.kernels.guard import refuse_mesh_axes, refuse_platform, refuse_wide_integers, relaxed
from seqattn.kernels.log_total import lse_of
from seqattn.kernels.no_gradient import is_floating, no_gradient
from seqattn.kernels.reverse_mode import reverse_only
from seqattn.kernels.tpu.plan import WIDEST, Operands, Plan, check, prepare
from seqattn.kernels.tpu.tiles import Tiles
from seqattn.platforms import on_tpu

_DTYPES = ("float32", "bfloat16")


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call."""
    _refuse(call)
    if not call.is_empty:
        # What a mask or a score modification does for each pair shows when it is traced; nothing is computed. The call
        # is no argument: coordinates and tables that are known must stay known.
        jax.eval_shape(lambda: check(call))


def note(call: Call) -> str | None:
    """Returns the note for `explain` on the tiles that the kernel visits."""
    if call.is_empty:
        return None
    head_dim = max(call.query.shape[-1], call.value.shape[-1])
    tiles = Tiles.of(call.query.shape[1], call.key.shape[1], head_dim)
    return blocks.note(call, tiles.queries, tiles.keys)


def attend(call: Call, *, interpret: bool = False) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`.

    Supports reverse mode only. Raises NotImplementedError for forward mode and second derivatives.

    Args:
        call: the call.
        interpret: run the kernel in Pallas's interpreter, without a TPU.
    """
    _refuse(dataclasses.replace(call, platform=None) if interpret else call)
    if call.is_empty:
        return call.nothing()
    plan, operands = prepare(call, interpret=interpret)
    with reverse_only():
        return _attend(plan, operands)


def _refuse(call: Call) -> None:
    """Raises NotImplementedError for what shows without a trace."""
    refuse_platform("the TPU kernel", "tpu", call)
    refuse_unknown("a grid of tiles", call.query.shape, call.key.shape)
    dtype = call.query.dtype
    if dtype not in _DTYPES or call.key.dtype != dtype:
        raise NotImplementedError(
            f"the TPU kernel takes {' and '.join(_DTYPES)}, not {dtype} with keys {call.key.dtype}"
        )
    if call.bias is not None:
        raise NotImplementedError("the TPU kernel takes no bias: a ScoreMod computes one from coordinates")
    if (widest := max(call.query.shape[-1], call.value.shape[-1])) > WIDEST:
        raise NotImplementedError(f"the TPU kernel takes head dims up to {WIDEST}, not {widest}")
    if call.value.shape[-1] == 0:
        raise NotImplementedError("tiles need a value dim of at least 1, got 0")
    refuse_wide_integers("the TPU kernel")
    refuse_mesh_axes("the TPU kernel", call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; the custom derivative rules are attached below."""
    output, lse = _here(plan, _without_parts, _types(plan)[:2], operands)
    return output, lse.swapaxes(1, 2)


def _forward(plan: Plan, operands: Operands) -> tuple[tuple[Array, Array], tuple]:
    """Returns the results, and the residuals for the backward pass: O(T + S) numbers, no scores."""
    output, peak, log_total = _here(plan, _with_parts, _types(plan), operands)
    lse = lse_of(peak, log_total).swapaxes(1, 2)
    return (output, lse), (operands, output, peak, log_total)


def _types(plan: Plan) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the types of the output and of the two parts of the log-sum-exp."""
    batch, num_heads, _, length, _, _, value_dim = plan.sizes
    output = jax.ShapeDtypeStruct((batch, length, num_heads, value_dim), plan.dtype)
    row = jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)
    return output, row, row


def _backward(plan: Plan, residuals: tuple, directions: tuple) -> tuple[Operands]:
    """Returns the gradients of the operands; integers have the gradient dtype `float0`."""
    operands, *results = residuals
    names = ("query", "key", "value", "scale", "mod")
    given = {name: getattr(operands, name) for name in names}
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    gradients = _here(plan, _gradients, types, operands, *results, *directions)
    zeros = jax.tree.map(no_gradient, operands)
    mod = [d if is_floating(d) else no_gradient(d) for d in gradients.pop("mod")]
    given = {name: d.astype(getattr(operands, name).dtype) for name, d in gradients.items()}
    return (dataclasses.replace(zeros, **given, mod=mod),)


_attend.defvjp(_forward, _backward)


def _here(plan: Plan, fn: Callable[..., Any], results: Any, *operands: Any) -> Any:
    """Runs a kernel in a program for a TPU, or anywhere if it is interpreted.

    In other programs it is not even traced: see `on_tpu`, which takes the types of the results.
    """

    def run(*operands: Any) -> Any:
        with relaxed(plan.dtype):  # Pallas relies on dtype promotions
            return fn(plan, *operands)

    return run(*operands) if plan.interpret else on_tpu(run, *operands, results=results)


@functools.partial(jax.jit, static_argnums=0)
def _without_parts(plan: Plan, operands: Operands) -> tuple[Array, ...]:
    """Runs the forward pass of a call without gradients, traced once for each plan and set of shapes."""
    # Imported here, because the import of Pallas is slow.
    from seqattn.kernels.tpu.forward import forward

    return forward(plan, operands, parts=False)


@functools.partial(jax.jit, static_argnums=0)
def _with_parts(plan: Plan, operands: Operands) -> tuple[Array, ...]:
    """Runs the forward pass for a backward pass, traced likewise."""
    from seqattn.kernels.tpu.forward import forward

    return forward(plan, operands, parts=True)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    plan: Plan, operands: Operands, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> dict[str, Any]:
    """Runs the backward pass, traced once for each plan and set of shapes."""
    from seqattn.kernels.tpu.backward import backward

    return backward(plan, operands, output, peak, log_total, d_output, d_lse)
