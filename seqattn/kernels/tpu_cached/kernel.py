"""The kernel as a function of a call. Its contract is that of `reference`; gradients are those of `cached`."""

import dataclasses
import functools

import jax
from jaxtyping import Array

from seqattn.kernels import cached, over_cache
from seqattn.kernels.call import Call, Columns, Result
from seqattn.kernels.guard import relaxed
from seqattn.kernels.tpu_cached.plan import Plan
from seqattn.platforms import on_tpu

_DTYPES = ("float32", "bfloat16")


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call."""
    over_cache.refuse("the TPU kernel", "tpu", _DTYPES, call)
    if not over_cache.is_empty(call):
        Plan.of(call, interpret=False)


def attend(call: Call, *, interpret: bool = False) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`.

    Supports reverse mode, with the backward pass of `cached`, which reads the whole cache. Raises NotImplementedError
    for forward mode.

    Args:
        call: the call.
        interpret: run the kernel in Pallas's interpreter, without a TPU.
    """
    refuse(dataclasses.replace(call, platform=None) if interpret else call)
    if over_cache.is_empty(call):
        return cached.attend(call)
    return over_cache.attend(over_cache.CacheKernel(Plan.of(call, interpret=interpret), _results, on_tpu), call)


@functools.partial(jax.jit, static_argnums=0)
def _results(plan: Plan, query: Array, columns: Columns, visible: Array | None, scale: Array) -> Result:
    """Runs the kernel, traced once for each plan and set of shapes: layers share it."""
    # Imported here, because the import of Pallas is slow.
    from seqattn.kernels.tpu_cached.forward import forward

    with relaxed(plan.product):  # Pallas relies on dtype promotions
        return forward(plan, query, columns, visible, scale)
