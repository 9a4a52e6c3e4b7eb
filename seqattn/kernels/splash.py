"""JAX's splash attention for TPUs, under seqattn's contract. `chunked` computes the log-sum-exp."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqattn.kernels import chunked
from seqattn.kernels.call import Call, Result, refuse_unknown
from seqattn.kernels.guard import (
    guarded,
    refuse_mesh_axes,
    refuse_platform,
    refuse_unsupported,
    refuse_wide_integers,
    relaxed,
)
from seqattn.kernels.native import Native, native_of
from seqattn.platforms import on_tpu

_BLOCK = 128


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call."""
    refuse_platform("splash attention", "tpu", call)
    refuse_unknown("splash attention", call.query.shape, call.key.shape)
    refuse_unsupported(call)
    if call.bias is not None:
        raise NotImplementedError("splash attention takes no bias")
    if call.query.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"splash attention takes float32 and bfloat16, not {call.query.dtype}")
    refuse_wide_integers("splash attention")
    refuse_mesh_axes("splash attention", (call.query, call.key, call.value))
    length, size = call.query.shape[1], call.key.shape[1]
    if length % _BLOCK or size % _BLOCK:
        raise NotImplementedError(f"T ({length}) and S ({size}) must be multiples of {_BLOCK}")
    native = native_of(call)
    if native.query_lengths is not None or native.key_lengths is not None:
        raise NotImplementedError("splash attention has a static mask, which cannot hold padding lengths")


def attend(call: Call) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`."""
    refuse(call)
    if call.is_empty:
        return call.nothing()
    native = native_of(call)

    def compute(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        # The splash kernel has no scale, so the queries are scaled in float32 and rounded once.
        scaled = (query.astype(call.high) * jnp.asarray(call.scale, call.high)).astype(query.dtype)
        return output_of(scaled, key, value, native), chunked.attend(call)[1]

    return guarded(compute, call.query, call.key, call.value, native)


def output_of(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    native: Native,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """Runs the splash kernel on scaled queries.

    Args:
        query: `[B, T, N, H]`, already scaled.
        key: `[B, S, K, H]`.
        value: `[B, S, K, V]`.
        native: the mask.
        interpret: run the kernel in Pallas's interpreter, without a TPU.
    """

    kernel, pulled = _traced_once(native.left, native.right, interpret)

    # Outside a TPU program the kernel must not be lowered at all: `on_tpu` wraps it in a primitive, which has no
    # derivative. The rules below are therefore written out, on top of the kernel's own.
    here = _call if interpret else on_tpu

    @jax.custom_vjp
    def output(*arrays: Array) -> Array:
        return here(kernel, *arrays)

    def forward(*arrays: Array) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
        return here(pulled, *arrays)

    def backward(pull: Callable[[Array], tuple[Array, ...]], direction: Array) -> tuple[Array, ...]:
        with relaxed(direction.dtype):  # the kernel's derivative relies on dtype promotions as well
            return here(_call, pull, direction)

    output.defvjp(forward, backward)
    return output(query, key, value)


def _call(fn: Callable[..., Any], *operands: Any) -> Any:
    """Calls the function directly, as the interpreter can run anywhere."""
    return fn(*operands)


@functools.lru_cache(maxsize=64)
def _traced_once(
    left: int | None, right: int | None, interpret: bool
) -> tuple[Callable[..., Array], Callable[..., tuple[Array, Callable[[Array], tuple[Array, ...]]]]]:
    """Returns the kernel of a mask, and the kernel with its pullback.

    A traced call works out the TPU's branch on every machine, and splash lists the tiles of its mask in Python. `jit`
    keeps the traced program, so the layers of a model pay for it once.
    """
    kernel = jax.jit(functools.partial(_output, left=left, right=right, interpret=interpret))
    return kernel, jax.jit(functools.partial(jax.vjp, kernel))


def _output(query: Array, key: Array, value: Array, *, left: int | None, right: int | None, interpret: bool) -> Array:
    """Builds the splash kernel for a mask and applies it to each batch row."""
    # Imported here, because the import is slow and only traced programs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    shape = (query.shape[1], key.shape[1])
    mask: splash_attention_mask.Mask
    # Each of splash's masks lets its kernel skip the tiles outside of it at compile time.
    if left is not None:
        mask = splash_attention_mask.LocalMask(shape, (left, right), offset=0)
    elif right is not None:
        mask = splash_attention_mask.CausalMask(shape, offset=right)
    else:
        mask = splash_attention_mask.FullMask(shape)
    heads = splash_attention_mask.MultiHeadMask([mask] * query.shape[2])
    with relaxed(query.dtype):
        kernel = splash_attention_kernel.make_splash_mha(heads, head_shards=1, q_seq_shards=1, interpret=interpret)
        by_head = (x.swapaxes(1, 2) for x in (query, key, value))
        return jax.vmap(kernel)(*by_head).swapaxes(1, 2)
