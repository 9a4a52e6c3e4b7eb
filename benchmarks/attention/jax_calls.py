"""Attention calls of other JAX libraries. Each gets the most compact form of the mask that it supports."""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
from jaxtyping import Array

from benchmarks.attention import patterns
from benchmarks.attention.call import AttentionCall
from benchmarks.attention.case import AttentionCase


def jax_nn(case: AttentionCase, implementation: str | None) -> AttentionCall:
    """`jax.nn.dot_product_attention` by XLA or by cuDNN."""
    attention: Any = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    # cuDNN requires a bias in the dtype of the inputs; XLA adds it to the scores, where float32 is more accurate.
    return _call(attention, case, windows=True, bias_dtype=case.dtype if implementation == "cudnn" else "float32")


def flax_nnx(case: AttentionCase, implementation: str | None) -> AttentionCall:
    """`flax.nnx.dot_product_attention`, which has no window argument."""
    from flax import nnx

    return _call(nnx.dot_product_attention, case, windows=False)


def tokamax(case: AttentionCase, implementation: str | None) -> AttentionCall:
    """`tokamax.dot_product_attention`; with implementation None it chooses its own."""
    tokamax = _import_tokamax()
    attention = functools.partial(tokamax.dot_product_attention, implementation=implementation)
    if cap := patterns.cap(case.pattern):
        capped = functools.partial(attention, is_causal=True, logits_soft_cap=cap)
        return AttentionCall(capped, "is_causal, logits_soft_cap")
    return _call(attention, case, windows=True)


def _import_tokamax() -> Any:
    import typeguard

    # Before 0.0.15, on Python 3.11, tokamax pins typeguard 2 for its decorators, which is incompatible with tyro. Later
    # typeguards read dimension names as types, and the import fails. Without the checks it computes the same.
    with mock.patch.object(typeguard, "typechecked", lambda function: function):
        import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():  # otherwise an old tokamax parses this program's command line and fails
        flags.FLAGS(["tokamax"])
    return tokamax


def _call(
    attention: Callable[..., Array], case: AttentionCase, *, windows: bool, bias_dtype: str = "float32"
) -> AttentionCall:
    """Builds a call with the parameters of jax.nn; `windows` says whether `local_window_size` is one of them.

    Raises NotImplementedError for a soft cap, which is none of them.
    """
    pattern, shape = case.pattern, case.shape
    if pattern == "full":
        return AttentionCall(attention, "")
    if pattern == "causal":
        return AttentionCall(functools.partial(attention, is_causal=True), "is_causal")
    patterns.refuse_cap(pattern, "jax.nn.dot_product_attention")
    if (size := patterns.window(pattern)) and windows:
        native = functools.partial(attention, is_causal=True, local_window_size=(size - 1, 0))
        return AttentionCall(native, "is_causal, local_window_size")
    if pattern == "alibi":
        # The causal mask stays native: a bias of -inf loses accuracy and, with cuDNN, prevents skipping tiles.
        return _with(attention, "bias", _distances(case).astype(bias_dtype), "is_causal, dense bias", is_causal=True)
    return _with(attention, "mask", patterns.dense_mask(pattern, shape), "dense mask")


def _with(attention: Callable[..., Array], name: str, array: np.ndarray, how: str, **options: Any) -> AttentionCall:
    def call(query: Array, key: Array, value: Array, extra: Array) -> Array:
        return attention(query, key, value, **{name: extra}, **options)

    return AttentionCall(call, how, (array,))


def _distances(case: AttentionCase) -> np.ndarray:
    """Returns ALiBi's penalties `[1, N, T, S]`, all finite."""
    bias = patterns.dense_bias(case.pattern, case.shape)
    return np.where(bias == -np.inf, np.float32(0), bias)
