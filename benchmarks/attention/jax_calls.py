"""The calls of other libraries for JAX: each gets the most compact form of a mask that it understands."""

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
    # cuDNN computes only with a bias of the inputs' dtype; XLA's sum with the scores gains from float32.
    return _call(attention, case, windows=True, bias_dtype=case.dtype if implementation == "cudnn" else "float32")


def flax_nnx(case: AttentionCase, implementation: str | None) -> AttentionCall:
    """`flax.nnx.dot_product_attention`, which knows no window."""
    from flax import nnx

    return _call(nnx.dot_product_attention, case, windows=False)


def tokamax(case: AttentionCase, implementation: str | None) -> AttentionCall:
    """`tokamax.dot_product_attention`; None is its own choice."""
    tokamax = _import_tokamax()
    attention = functools.partial(tokamax.dot_product_attention, implementation=implementation)
    return _call(attention, case, windows=True)


def _import_tokamax() -> Any:
    import typeguard

    # tokamax decorates with typeguard 2 (pinned), which tyro cannot use; later ones read the names of dimensions as
    # types, and the import fails. It computes the same unchecked.
    with mock.patch.object(typeguard, "typechecked", lambda function: function):
        import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():  # else tokamax reads this program's command line, and refuses it
        flags.FLAGS(["tokamax"])
    return tokamax


def _call(
    attention: Callable[..., Array], case: AttentionCase, *, windows: bool, bias_dtype: str = "float32"
) -> AttentionCall:
    """A function with jax.nn's parameters; `windows` tells whether local_window_size is one of them."""
    pattern, shape = case.pattern, case.shape
    if pattern == "full":
        return AttentionCall(attention, "")
    if pattern == "causal":
        return AttentionCall(functools.partial(attention, is_causal=True), "is_causal")
    if pattern == "window" and windows:
        native = functools.partial(attention, is_causal=True, local_window_size=(patterns.WINDOW - 1, 0))
        return AttentionCall(native, "is_causal, local_window_size")
    if pattern == "alibi":
        # The causal part stays native: a bias of -inf costs exactness and, with cuDNN, the skipping of tiles.
        return _with(attention, "bias", _distances(case).astype(bias_dtype), "is_causal, dense bias", is_causal=True)
    return _with(attention, "mask", patterns.dense_mask(pattern, shape), "dense mask")


def _with(attention: Callable[..., Array], name: str, array: np.ndarray, how: str, **options: Any) -> AttentionCall:
    def call(query: Array, key: Array, value: Array, extra: Array) -> Array:
        return attention(query, key, value, **{name: extra}, **options)

    return AttentionCall(call, how, (array,))


def _distances(case: AttentionCase) -> np.ndarray:
    """ALiBi's penalties `[1, N, T, S]`, finite everywhere."""
    bias = patterns.dense_bias(case.pattern, case.shape)
    return np.where(bias == -np.inf, np.float32(0), bias)
