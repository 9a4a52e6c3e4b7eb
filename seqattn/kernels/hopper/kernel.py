"""The Hopper kernel as a function with a custom derivative rule. Its contract is that of `reference`.

The forward pass is a kernel. The backward pass is kernels, too, if no array but query, key and value may need a
gradient. For all other calls it is that of `chunked`, from the log-sum-exp that the kernel returns.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqattn.kernels.call import Call, Result, refuse_unknown
from seqattn.kernels.chunked.kernel import gradients_of
from seqattn.kernels.chunked.plan import Leaves
from seqattn.kernels.chunked.plan import Plan as TiledPlan
from seqattn.kernels.chunked.plan import prepare as prepare_tiles
from seqattn.kernels.guard import refuse_assembler, refuse_mesh_axes, refuse_platform, refuse_wide_integers, relaxed
from seqattn.kernels.hopper.backward_plan import why_chunked
from seqattn.kernels.hopper.plan import TILINGS, Operands, Plan, prepare
from seqattn.kernels.log_total import lse_of
from seqattn.kernels.no_gradient import is_floating, no_gradient, refuse_second
from seqattn.kernels.reverse_mode import reverse_only
from seqattn.platforms import on_gpu

_DTYPES = ("bfloat16", "float16")

_MOST_ROWS = 65535
"""The largest second and third dim of a grid in CUDA."""


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call."""
    _refuse(call)
    if not call.is_empty:
        # What a mask or a score modification does for each pair shows when it is traced; nothing is computed. The call
        # is no argument: coordinates and tables that are known must stay known.
        jax.eval_shape(lambda: prepare(call)[1])


def note(call: Call) -> str | None:
    """Returns who computes the gradients, if it is not the kernel."""
    if call.is_empty:
        return None
    found: list[str | None] = []
    jax.eval_shape(lambda: found.append(why_chunked(call, prepare(call)[0].score_mod)))
    return None if found[0] is None else f"chunked computes the gradients: {found[0]}"


def attend(call: Call, *, interpret: Any = None) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`.

    Supports reverse mode only. Raises NotImplementedError for forward mode and second derivatives.

    Args:
        call: the call.
        interpret: an `InterpretGPUParams`, to run the kernel in Pallas's interpreter without a GPU.
    """
    _refuse(call if interpret is None else dataclasses.replace(call, platform=None))
    if call.is_empty:
        return call.nothing()
    plan, operands = prepare(call, interpret=interpret)
    with reverse_only():
        if plan.backward is not None:
            return _attend(plan, operands)
        tiled, leaves = prepare_tiles(call)
        # All gradients are those of the leaves, which hold the same arrays in the form of the backward pass.
        return _attend_tiled(plan, tiled, jax.lax.stop_gradient(operands), leaves)


def _refuse(call: Call) -> None:
    """Raises NotImplementedError for what shows without a trace."""
    refuse_platform("the Hopper kernel", "gpu", call)
    refuse_unknown("a grid of tiles", call.query.shape, call.key.shape)
    dtype = call.query.dtype
    if dtype not in _DTYPES or call.key.dtype != dtype:
        raise NotImplementedError(
            f"the Hopper kernel takes {' and '.join(_DTYPES)}, not {dtype} with keys {call.key.dtype}"
        )
    _refuse_dims(call.query.shape[-1], call.value.shape[-1])
    if call.query.shape[0] > _MOST_ROWS:
        raise NotImplementedError(f"{call.query.shape[0]} batch rows; the grid of a kernel has at most {_MOST_ROWS}")
    refuse_wide_integers("the Hopper kernel")
    refuse_mesh_axes("the Hopper kernel", call)
    _refuse_machine()


def _refuse_dims(head_dim: int, value_dim: int) -> None:
    """Raises NotImplementedError for dims without a tiling."""
    if head_dim not in TILINGS or value_dim != head_dim:
        dims = ", ".join(map(str, TILINGS))
        raise NotImplementedError(f"H ({head_dim}) and V ({value_dim}) must be equal, and one of {dims}")


def _refuse_machine() -> None:
    """Raises NotImplementedError if Pallas Mosaic GPU is missing, or the machine's GPU is of another generation."""
    try:
        # Imported here, because the import is slow and needs absl-py, which JAX does not install.
        from jax.experimental.pallas import mosaic_gpu  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"Pallas Mosaic GPU cannot be imported ({error}); it needs absl-py") from error
    refuse_assembler()
    if jax.default_backend() == "gpu" and (found := jax.local_devices()[0].compute_capability) != "9.0":
        raise NotImplementedError(f"the Hopper kernel is for compute capability 9.0, and this GPU has {found}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; the custom derivative rules are attached below."""
    return _forward(plan, operands)[0]


def _forward(plan: Plan, operands: Operands) -> tuple[tuple[Array, Array], tuple]:
    """Returns the results, and the residuals for the backward pass: O(T + S) numbers, no scores."""
    batch, num_heads, _, length = plan.sizes[:4]
    row = jax.ShapeDtypeStruct((batch, length, num_heads), jnp.float32)
    types = jax.ShapeDtypeStruct((*row.shape, operands.value.shape[-1]), plan.dtype), row, row
    given = dataclasses.replace(operands, backward=())
    output, peak, log_total = _here(plan, _results, types, given)
    return (output, lse_of(peak, log_total)), (operands, output, peak, log_total)


def _backward(plan: Plan, residuals: tuple, directions: tuple) -> tuple[Operands]:
    """Returns the gradients of query, key and value. No other array has one: see `backward_plan.why_chunked`."""
    operands, *results = residuals
    return (
        dataclasses.replace(jax.tree.map(no_gradient, operands), **_gradients(plan, operands, *results, *directions)),
    )


_attend.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(
    plan: Plan, operands: Operands, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> dict[str, Array]:
    """Returns the gradients of query, key and value, by name."""
    arrays = {name: getattr(operands, name) for name in ("query", "key", "value")}
    types = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    return _here(plan, _own_gradients, types, operands, output, peak, log_total, d_output, d_lse)


_gradients.defvjp(refuse_second, refuse_second)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_tiled(plan: Plan, tiled: TiledPlan, operands: Operands, leaves: Leaves) -> tuple[Array, Array]:
    """Returns the same as `_attend`, with the gradients of `chunked`."""
    return _forward(plan, operands)[0]


def _forward_tiled(
    plan: Plan, tiled: TiledPlan, operands: Operands, leaves: Leaves
) -> tuple[tuple[Array, Array], tuple]:
    """Returns the results and the residuals, with the leaves."""
    found, (_, *results) = _forward(plan, operands)
    return found, (operands, leaves, *results)


def _backward_tiled(plan: Plan, tiled: TiledPlan, residuals: tuple, directions: tuple) -> tuple[Operands, list[Any]]:
    """Returns the gradients of operands, which are zeros, and of leaves."""
    operands, leaves, *results = residuals
    gradients = iter(gradients_of(tiled, leaves, *results, *directions))
    given = [next(gradients) if is_floating(x) else no_gradient(x) for x in leaves]
    return jax.tree.map(no_gradient, operands), given


_attend_tiled.defvjp(_forward_tiled, _backward_tiled)


def _here(plan: Plan, fn: Callable[..., Any], types: Any, *operands: Any) -> Any:
    """Runs a kernel in a program for a GPU, or anywhere if it is interpreted."""

    def run(*operands: Any) -> Any:
        with relaxed(plan.dtype):  # Pallas relies on dtype promotions
            return fn(plan, *operands)

    return run(*operands) if plan.interpret else on_gpu(run, *operands, results=types)


@functools.partial(jax.jit, static_argnums=0)
def _results(plan: Plan, operands: Operands) -> tuple[Array, Array, Array]:
    """Runs the forward pass, traced once for each plan and set of shapes."""
    # Imported here, because the import of Pallas is slow and needs absl-py.
    from seqattn.kernels.hopper.forward import forward

    return forward(plan, operands)


@functools.partial(jax.jit, static_argnums=0)
def _own_gradients(
    plan: Plan, operands: Operands, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> dict[str, Array]:
    """Runs the backward pass, traced once for each plan and set of shapes."""
    from seqattn.kernels.hopper.backward import backward

    return backward(plan, operands, output, peak, log_total, d_output, d_lse)
