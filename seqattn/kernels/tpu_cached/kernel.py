"""The kernel as a function of a call. Its contract is that of `reference`; gradients are those of `cached`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqattn.coordinates import Coordinates
from seqattn.kernels import cached
from seqattn.kernels.call import Call, Columns, Result, refuse_unknown
from seqattn.kernels.guard import refuse_mesh_axes, refuse_platform, refuse_wide_integers, relaxed
from seqattn.kernels.reference import visibility
from seqattn.kernels.reverse_mode import reverse_only
from seqattn.kernels.tpu_cached.plan import Plan
from seqattn.platforms import on_tpu

_DTYPES = ("float32", "bfloat16")

MOST_QUERIES = 64
"""The most queries of a row: the mask is computed for each of them and each slot, which `tpu` does not do."""


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call."""
    _refuse(call)
    if not _is_empty(call):
        Plan.of(call, interpret=False)


def attend(call: Call, *, interpret: bool = False) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`.

    Supports reverse mode, with the backward pass of `cached`, which reads the whole cache. Raises NotImplementedError
    for forward mode.

    Args:
        call: the call.
        interpret: run the kernel in Pallas's interpreter, without a TPU.
    """
    _refuse(dataclasses.replace(call, platform=None) if interpret else call)
    if _is_empty(call):
        return cached.attend(call)
    # The mask becomes an array: a derivative rule must not hold a user's function.
    visible = visibility(call.query.shape, call.mask, None, call.q_at, call.kv_at)
    plan = Plan.of(call, interpret=interpret)
    with reverse_only():
        return _attend(plan, call.query, call.columns, visible, jnp.asarray(call.scale, jnp.float32))


def _is_empty(call: Call) -> bool:
    return 0 in (*call.query.shape, *call.columns.value.shape)


def _refuse(call: Call) -> None:
    """Raises NotImplementedError for what needs no plan."""
    cached.refuse(call)
    refuse_platform("the TPU kernel", "tpu", call)
    columns = call.columns
    refuse_unknown("a grid of tiles", call.query.shape, columns.key.shape)
    for name, x in (("queries", call.query), ("keys", columns.key), ("values", columns.value)):
        if x.dtype not in _DTYPES:
            raise NotImplementedError(f"the TPU kernel takes {' and '.join(_DTYPES)}, not {name} of {x.dtype}")
    if call.bias is not None:
        raise NotImplementedError("the TPU kernel takes no bias over a cache; cached does")
    if call.score_mod is not None:
        kind = type(call.score_mod).__name__
        raise NotImplementedError(f"the TPU kernel takes no score modification over a cache ({kind}); cached does")
    if (length := call.query.shape[1]) > MOST_QUERIES:
        raise NotImplementedError(f"the TPU kernel takes up to {MOST_QUERIES} queries over a cache, not {length}")
    refuse_wide_integers("the TPU kernel")
    refuse_mesh_axes("the TPU kernel", call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, *operands: Any) -> Result:
    """Returns the output and the log-sum-exp of queries, columns, visible pairs or None, and the scale."""
    return _forward(plan, *operands)[0]


def _forward(plan: Plan, *operands: Any) -> tuple[Result, tuple[Any, ...]]:
    """Returns the results, and what the backward pass reads: no scores are kept."""
    if plan.interpret:
        return _results(plan, *operands), operands
    batch, num_heads, _, length, _, _, value_dim = plan.sizes
    types = (
        jax.ShapeDtypeStruct((batch, length, num_heads, value_dim), plan.dtypes[0]),
        jax.ShapeDtypeStruct((batch, length, num_heads), jnp.float32),
    )
    run = functools.partial(_results, plan)
    return on_tpu(run, *operands, results=types, if_split=_whole), operands


def _backward(plan: Plan, operands: tuple[Any, ...], directions: Any) -> tuple[Any, ...]:
    """Returns the gradients of the operands, as `cached` has them."""
    return jax.vjp(_whole, *operands)[1](directions)


_attend.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=0)
def _results(plan: Plan, query: Array, columns: Columns, visible: Array | None, scale: Array) -> Result:
    """Runs the kernel, traced once for each plan and set of shapes: layers share it."""
    # Imported here, because the import of Pallas is slow.
    from seqattn.kernels.tpu_cached.forward import forward

    with relaxed(plan.product):  # Pallas relies on dtype promotions
        return forward(plan, query, columns, visible, scale)


def _whole(query: Array, columns: Columns, visible: Array | None, scale: Array) -> Result:
    """Computes the same with `cached`, which reads the whole cache."""
    # An array as the mask reads no coordinates.
    at = (Coordinates.range(n) for n in (query.shape[1], columns.key.shape[3]))
    located = dict(zip(("q_at", "kv_at"), (jax.tree.map(lambda x: x[None], each) for each in at), strict=True))
    unused = dict.fromkeys(("key", "value", "bias", "score_mod", "rows", "dropout"))
    return cached.attend(Call(query=query, columns=columns, mask=visible, scale=scale, **located, **unused))
