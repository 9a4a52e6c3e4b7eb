"""Attention of a few queries to keys in the layout of a cache: a decoding step copies and transposes no keys.

Keeps all scores in memory. The contract is that of `reference`; the cache has already replaced non-finite entries.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from seqattn.kernels.call import Call, Columns, Result
from seqattn.kernels.reference import nan_unless_finite, softmax, visibility


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call."""
    if call.columns is None:
        raise NotImplementedError("the keys are not in the layout of a cache (Columns)")
    if call.dropout is not None and call.dropout.rate != 0:
        raise NotImplementedError("attention to a cache has no dropout; chunked and reference have it")


def attend(call: Call) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`."""
    refuse(call)
    columns, high = call.columns, call.high
    batch, length, num_heads, head_dim = call.query.shape
    num_kv_heads, size = columns.key.shape[1], columns.key.shape[3]
    group = num_heads // num_kv_heads
    visible = visibility(call.query.shape, call.mask, call.bias, call.q_at, call.kv_at)
    query, rows, bad = _of_rows_that_see(call, visible)
    # The queries move to the layout of the keys, `[B, K, queries, H]`: a step has few queries and many cached keys. All
    # heads of a group become rows of one product.
    grouped = query.reshape(batch, length, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, num_kv_heads, group * length, head_dim)
    scores = _product("bkth,bkhs->bkts", grouped, columns.key, high).reshape(batch, num_heads, length, size)
    # Scaled after the product, which is accumulated in float32 or wider: cached keys may be bfloat16.
    scores = scores * jnp.asarray(call.scale, high)
    if call.bias is not None:
        # A bias of -inf has masked its pair in `visibility`; as a number it would make sums infinite.
        bias = jnp.where(call.bias == -jnp.inf, jnp.zeros_like(call.bias), call.bias)
        scores = scores + jnp.broadcast_to(bias, scores.shape).astype(high)
    if call.score_mod is not None:
        # As in the other kernels, a score modification sees 0 for a masked pair.
        scores = scores if visible is None else jnp.where(visible, scores, jnp.zeros_like(scores))
        heads = jnp.arange(num_heads, dtype=jnp.int32)
        scores = call.score_mod.over(scores, call.q_at, call.kv_at, heads, rows)
        allowed = scores != -jnp.inf
        visible = allowed if visible is None else visible & allowed
    # Marks of non-finite queries and keys are added last: both the mask and the modification may have hidden them.
    weights, lse = softmax(scores + bad + _nan_unless_finite(columns, num_heads).astype(high), visible)
    # The second product reads the values as the cache stores them, in their dtype.
    weights = weights.reshape(batch, num_kv_heads, group * length, size).astype(columns.value.dtype)
    output = _product("bkts,bksv->bktv", weights, columns.value, high)
    output = output.reshape(batch, num_kv_heads, group, length, columns.value.shape[-1]).transpose(0, 3, 1, 2, 4)
    output = output.reshape(batch, length, num_heads, columns.value.shape[-1])
    return output.astype(call.query.dtype), lse.swapaxes(1, 2)


def in_rows(call: Call) -> Call:
    """Returns the call with keys and values in rows, as all other kernels read them, NaN where they were not finite."""
    if call.columns is None:
        return call
    key, value = rows_of(call.columns)
    return dataclasses.replace(call, key=key, value=value, columns=None)


def as_if_in_rows(call: Call) -> Call:
    """Returns the call of `in_rows` with only the shapes and dtypes of keys and values, enough to refuse it."""
    if call.columns is None:
        return call
    (batch, heads, head_dim, size), dim = call.columns.key.shape, call.columns.value.shape[-1]
    key = jax.ShapeDtypeStruct((batch, size, heads, head_dim), call.columns.key.dtype)
    value = jax.ShapeDtypeStruct((batch, size, heads, dim), call.columns.value.dtype)
    return dataclasses.replace(call, key=key, value=value, columns=None)


def rows_of(columns: Columns) -> tuple[Array, Array]:
    """Returns keys and values `[B, S, K, H]`, NaN where they were not finite."""
    finite = columns.finite[..., None, None] if columns.finite.ndim == 2 else columns.finite.swapaxes(1, 2)[..., None]
    key, value = columns.key.transpose(0, 3, 1, 2), columns.value.swapaxes(1, 2)
    return jnp.where(finite, key, jnp.nan), jnp.where(finite, value, jnp.nan)


def _of_rows_that_see(call: Call, visible: Any) -> tuple[Array, Array | None, Array]:
    """Returns finite queries, their finite rows, and the marks `[B, N, T, 1]` of the queries that were not finite.

    A fully masked query may hold anything, and a score modification may mask the remaining keys of a query.
    """
    seen = True if visible is None else visible.any(axis=-1).swapaxes(1, 2)[..., None]
    bad = nan_unless_finite(call.query)
    shown = ~jnp.isnan(bad) & seen
    # `jnp.where` on the input, as in `reference`: a mask on the result would leave NaN gradients.
    query = jnp.where(shown, call.query, jnp.zeros_like(call.query))
    rows = None if call.rows is None else jnp.where(shown, call.rows, jnp.zeros_like(call.rows))
    return query, rows, bad.swapaxes(1, 2).astype(call.high)


def _nan_unless_finite(columns: Columns, num_heads: int) -> Array:
    """Returns 0 for each key, or NaN if the cached key was not finite: `[B, 1 or N, 1, S]`."""
    finite = columns.finite[:, None] if columns.finite.ndim == 2 else columns.finite
    # The flags may be shared by all heads. If not, each query head takes the flag of its key head.
    by_head = finite if finite.shape[1] == 1 else jnp.repeat(finite, num_heads // finite.shape[1], axis=1)
    return jnp.where(by_head, 0.0, jnp.nan)[:, :, None]


def _product(subscripts: str, left: Array, right: Array, high: Any) -> Array:
    """Computes a product of operands in the cache's dtype, accumulated in `high`."""
    return jnp.einsum(subscripts, left, right, precision=lax.Precision.HIGHEST, preferred_element_type=high)
