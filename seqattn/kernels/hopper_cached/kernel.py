"""The kernel as a function of a call. Its contract is that of `reference`; gradients are those of `cached`."""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array

from seqattn.kernels import cached, over_cache
from seqattn.kernels.call import Call, Columns, Result
from seqattn.kernels.guard import relaxed
from seqattn.kernels.hopper.machine import DTYPES, refuse_dims, refuse_machine, refuse_rows
from seqattn.kernels.hopper_cached.plan import TILINGS, Plan
from seqattn.platforms import on_gpu

_NAME = "the Hopper kernel"


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call."""
    over_cache.refuse(_NAME, "gpu", DTYPES, call)
    query, columns = call.query, call.columns
    if not query.dtype == columns.key.dtype == columns.value.dtype:
        raise NotImplementedError(
            f"{_NAME} takes a cache of the dtype of the queries, not keys of {columns.key.dtype} and values of "
            f"{columns.value.dtype} with queries of {query.dtype}"
        )
    if not over_cache.is_empty(call):
        _refuse_sizes(call)
    refuse_machine()


def attend(call: Call, *, interpret: Any = None) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`.

    Supports reverse mode, with the backward pass of `cached`, which reads the whole cache. Raises NotImplementedError
    for forward mode.

    Args:
        call: the call.
        interpret: an `InterpretGPUParams`, to run the kernel in Pallas's interpreter without a GPU.
    """
    refuse(call if interpret is None else dataclasses.replace(call, platform=None))
    if over_cache.is_empty(call):
        return cached.attend(call)
    return over_cache.attend(over_cache.CacheKernel(Plan.of(call, interpret=interpret), _results, on_gpu), call)


def _refuse_sizes(call: Call) -> None:
    """Raises NotImplementedError for sizes that no plan has."""
    _, length, num_heads, head_dim = call.query.shape
    _, num_kv_heads, size, value_dim = call.columns.value.shape
    refuse_dims(head_dim, value_dim, tuple(TILINGS))
    refuse_rows(call)
    tiling, group = TILINGS[head_dim], num_heads // num_kv_heads
    if group * length > tiling.queries:
        raise NotImplementedError(
            f"{length} queries of {group} heads are {group * length} rows of a key head, and {_NAME} takes up to "
            f"{tiling.queries} over a cache"
        )
    if size % tiling.slots:
        raise NotImplementedError(
            f"the slots of the cache ({size}) must be a multiple of {tiling.slots}, as tiles are copied whole"
        )


@functools.partial(jax.jit, static_argnums=0)
def _results(plan: Plan, query: Array, columns: Columns, visible: Array | None, scale: Array) -> Result:
    """Runs the kernel, traced once for each plan and set of shapes: layers share it."""
    # Imported here, because the import of Pallas is slow and needs absl-py.
    from seqattn.kernels.hopper_cached.forward import forward

    with relaxed(plan.dtype):  # Pallas relies on dtype promotions
        return forward(plan, query, columns, visible, scale)
