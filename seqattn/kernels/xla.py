"""The attention of `jax.nn` as XLA compiles it, with every score in memory, under seqattn's contract."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqattn.kernels import reference
from seqattn.kernels.call import Call, Result
from seqattn.kernels.guard import guarded, jax_nn, refuse_other_values, refuse_unsupported, zeroed_if_any
from seqattn.kernels.native import Native, pairs_of
from seqattn.platforms import PLATFORMS, by_platform

# jax.nn masks a score by replacing it with -0.7 times the largest float32.
_ABOVE_HIDDEN = np.float32(-0.5 * np.finfo(np.float32).max)


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call."""
    refuse_unsupported(call)
    refuse_other_values(call)
    if call.query.dtype == jnp.float64:
        raise NotImplementedError("jax.nn computes the softmax of float64 in float32; reference and chunked do not")


def attend(call: Call) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`."""
    refuse(call)
    if call.is_empty:
        return call.nothing()
    pairs = pairs_of(call)
    options: dict[str, Any] = {"implementation": "xla", "scale": call.scale}
    # jax.nn builds windows and lengths from iotas, which XLA fuses; a dense mask would be read from memory.
    if isinstance(pairs, Native):
        options |= pairs.for_jax_nn(call.query.shape[0], call.query.shape[1], call.key.shape[1])
    else:
        options |= {"mask": pairs, "bias": None if call.bias is None else _above_hidden(call.bias)}
    platforms = PLATFORMS if call.platform is None else (call.platform,)
    # `by_platform` merges equal functions, so platforms that compute in the same dtype share one branch.
    in_dtype = {dtype: functools.partial(_output, dtype, options) for dtype in (call.query.dtype, call.high)}
    branches = {name: in_dtype[_computed(name, call)] for name in platforms}

    def compute(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        # The log-sum-exp of `jax.nn` has no gradient. This one costs a second product only if it is used.
        _, lse = reference.softmax(*reference.logits(dataclasses.replace(call, query=query, key=key)))
        return by_platform(branches, query, key, value), lse.swapaxes(1, 2)

    return guarded(compute, call.query, call.key, call.value, pairs, zeroed_if_any)


def note(call: Call) -> str:
    """Returns the note for `explain` on what happens to the mask."""
    if isinstance(pairs_of(call), Native):
        return "computes and stores the score of every pair"
    return "computes and stores the score of every pair; the mask becomes a dense array"


def _output(dtype: np.dtype, options: dict[str, Any], query: Array, key: Array, value: Array) -> Array:
    """Calls `jax.nn` in `dtype` and returns the output in the dtype of the query."""
    return jax_nn(*(x.astype(dtype) for x in (query, key, value)), **options).astype(query.dtype)


def _computed(platform: str, call: Call) -> np.dtype:
    """Returns the dtype to compute in.

    jax.nn asks for 16-bit products, which a CPU does not have, nor a TPU in float16. Their derivatives rely on dtype
    promotions, which strict promotion forbids.
    """
    config: Any = jax.config
    if config.jax_numpy_dtype_promotion == "strict":
        return call.high
    lacking = platform == "cpu" or (platform != "gpu" and call.query.dtype == jnp.float16)
    return call.high if lacking else call.query.dtype


def _above_hidden(bias: Array) -> Array:
    """Returns the bias in float32 with its own gradient, clamped above the value with which jax.nn masks scores."""
    bias = bias.astype(jnp.float32)
    # Biases of -inf are in `pairs` as a mask; here they would turn sums into NaN.
    shown = jnp.where(bias == -jnp.inf, jnp.zeros_like(bias), bias)
    # The clamp is a constant for the gradient, which stays that of the bias.
    return shown + jax.lax.stop_gradient(jnp.maximum(shown, _ABOVE_HIDDEN) - shown)
