"""cuDNN's fused attention through `jax.nn`, under seqattn's contract. `chunked` computes the log-sum-exp."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqattn.kernels import chunked
from seqattn.kernels.call import Call, Result, refuse_unknown
from seqattn.kernels.guard import guarded, jax_nn, refuse_other_values, refuse_platform, refuse_unsupported
from seqattn.kernels.native import Native, native_of, pairs_of

_HEAD_DIM = 256


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call.

    JAX asks the local cuDNN what it supports. A program compiled for a GPU on a machine without one therefore takes
    another kernel.
    """
    refuse_platform("cuDNN", "gpu", call)
    refuse_unknown("cuDNN", call.query.shape, call.key.shape)
    refuse_unsupported(call)
    refuse_other_values(call)
    native = _native(call)
    if call.is_empty:
        return
    arrays = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (call.query, call.key, call.value))
    # Tracing asks JAX and cuDNN for their own checks, at no cost on the device.
    try:
        jax.eval_shape(lambda *given: jax_nn(*given, **_options(call, native)), *arrays)
    except RuntimeError as reason:
        raise NotImplementedError(str(reason)) from reason


def attend(call: Call) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`."""
    refuse(call)
    if call.is_empty:
        return call.nothing()
    native = _native(call)
    options = _options(call, native)

    def compute(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        return jax_nn(query, key, value, **options), chunked.attend(call)[1]

    # A bias of -inf masks single pairs, which `Native` cannot express; a dense array can.
    pairs = native if call.bias is None else pairs_of(call)
    return guarded(compute, call.query, call.key, call.value, pairs)


def _options(call: Call, native: Native) -> dict[str, Any]:
    """Returns the keyword arguments for `jax.nn.dot_product_attention`."""
    window = {} if native.left is None else {"local_window_size": (native.left, 0)}
    options = {"implementation": "cudnn", "scale": float(call.scale), "is_causal": native.right == 0} | window
    options |= native.lengths_for_jax_nn(call.query.shape[0])
    if call.bias is not None:
        # cuDNN adds the bias itself. -inf - -inf in its softmax would be NaN, so masked pairs get a large finite
        # number.
        options["bias"] = jnp.where(call.bias == -jnp.inf, _hidden(call.bias.dtype), call.bias)
    return options


def _hidden(dtype: np.dtype) -> Array:
    """Returns the bias with which jax.nn masks a score on cuDNN, which cannot subtract infinities."""
    return jnp.asarray(-(2.0**41) if dtype == jnp.bfloat16 else -(2.0**15), dtype)


def _native(call: Call) -> Native:
    """Returns the mask for cuDNN.

    Raises:
        NotImplementedError: cuDNN would refuse the call, in the forward or the backward pass, or compute it wrongly.
    """
    query, scale, bias = call.query, call.scale, call.bias
    (length, _, head_dim), size = query.shape[1:], call.key.shape[1]
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"cuDNN takes float16 and bfloat16, not {query.dtype}")
    if head_dim % 8 or head_dim > _HEAD_DIM:
        raise NotImplementedError(f"head_dim ({head_dim}) must be a multiple of 8 and at most {_HEAD_DIM}")
    if not isinstance(scale, int | float | np.number):
        raise NotImplementedError("cuDNN needs a scale that is known at trace time")
    # From here on: the windows, lengths and biases that cuDNN rejects or gets wrong, each with its reason.
    native = native_of(call)
    if native.right not in (0, None):
        raise NotImplementedError(f"cuDNN has no window of {native.right} keys ahead of the query")
    if native.left is not None and (native.right is None or length > size or bias is not None):
        raise NotImplementedError("cuDNN supports a left window only with a causal mask, T <= S and without a bias")
    lengths = [x for x in (native.query_lengths, native.key_lengths) if x is not None]
    if any((x == 0).any() for x in lengths):
        raise NotImplementedError("cuDNN is not used for rows of length 0")
    if bias is not None:
        if bias.dtype != query.dtype:
            raise NotImplementedError(f"cuDNN needs a bias of the query's dtype {query.dtype}, got {bias.dtype}")
        if bias.shape[2:] != (length, size) or length % 2 or size % 2:
            raise NotImplementedError(
                f"cuDNN needs a bias [.., T, S] {(length, size)} with even T and S, got {bias.shape[2:]}"
            )
    return native
