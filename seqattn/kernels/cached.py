"""Attention of a few queries to keys that lie as a cache keeps them, so that a step copies and transposes none.

All scores are in memory. The contract is that of `reference`, but the cache has already replaced what is not finite.
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
    """Raises NotImplementedError, with the reason, for a call that `attend` cannot serve."""
    if call.columns is None:
        raise NotImplementedError("the keys do not lie as columns, in which a cache keeps them")
    if call.dropout is not None and call.dropout.rate != 0:
        raise NotImplementedError("a step through a cache drops no weights; chunked and reference do")


def attend(call: Call) -> Result:
    """The output and the log-sum-exp of the logits, as `reference.attend`."""
    refuse(call)
    columns, high = call.columns, call.high
    batch, length, num_heads, head_dim = call.query.shape
    num_kv_heads, size = columns.key.shape[1], columns.key.shape[3]
    group = num_heads // num_kv_heads
    visible = visibility(call.query.shape, call.mask, call.bias, call.q_at, call.kv_at)
    query, rows, bad = _of_rows_that_see(call, visible)
    grouped = query.reshape(batch, length, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, num_kv_heads, group * length, head_dim)
    scores = _product("bkth,bkhs->bkts", grouped, columns.key, high).reshape(batch, num_heads, length, size)
    scores = scores * jnp.asarray(call.scale, high)
    if call.bias is not None:
        bias = jnp.where(call.bias == -jnp.inf, jnp.zeros_like(call.bias), call.bias)
        scores = scores + jnp.broadcast_to(bias, scores.shape).astype(high)
    if call.score_mod is not None:
        # As in the other kernels, a score modification never sees what a hidden pair holds.
        scores = scores if visible is None else jnp.where(visible, scores, jnp.zeros_like(scores))
        heads = jnp.arange(num_heads, dtype=jnp.int32)
        scores = call.score_mod.over(scores, call.q_at, call.kv_at, heads, rows)
        allowed = scores != -jnp.inf
        visible = allowed if visible is None else visible & allowed
    weights, lse = softmax(scores + bad + _nan_unless_finite(columns, num_heads).astype(high), visible)
    weights = weights.reshape(batch, num_kv_heads, group * length, size).astype(columns.value.dtype)
    output = _product("bkts,bksv->bktv", weights, columns.value, high)
    output = output.reshape(batch, num_kv_heads, group, length, columns.value.shape[-1]).transpose(0, 3, 1, 2, 4)
    output = output.reshape(batch, length, num_heads, columns.value.shape[-1])
    return output.astype(call.query.dtype), lse.swapaxes(1, 2)


def in_rows(call: Call) -> Call:
    """The call for every other kernel: keys and values in rows, with NaN where they were not finite."""
    if call.columns is None:
        return call
    key, value = rows_of(call.columns)
    return dataclasses.replace(call, key=key, value=value, columns=None)


def as_if_in_rows(call: Call) -> Call:
    """The call of `in_rows` with nothing but shapes and dtypes of keys and values: enough to refuse it."""
    if call.columns is None:
        return call
    (batch, heads, head_dim, size), dim = call.columns.key.shape, call.columns.value.shape[-1]
    key = jax.ShapeDtypeStruct((batch, size, heads, head_dim), call.columns.key.dtype)
    value = jax.ShapeDtypeStruct((batch, size, heads, dim), call.columns.value.dtype)
    return dataclasses.replace(call, key=key, value=value, columns=None)


def rows_of(columns: Columns) -> tuple[Array, Array]:
    """Keys and values `[B, S, K, H]`, with NaN where they were not finite."""
    finite = columns.finite[..., None, None] if columns.finite.ndim == 2 else columns.finite.swapaxes(1, 2)[..., None]
    key, value = columns.key.transpose(0, 3, 1, 2), columns.value.swapaxes(1, 2)
    return jnp.where(finite, key, jnp.nan), jnp.where(finite, value, jnp.nan)


def _of_rows_that_see(call: Call, visible: Any) -> tuple[Array, Array | None, Array]:
    """Queries and their rows, finite, and `[B, N, T, 1]` what marks the scores of those that were not.

    A query that sees nothing may hold anything, and a score modification may hide what a query sees.
    """
    seen = True if visible is None else visible.any(axis=-1).swapaxes(1, 2)[..., None]
    bad = nan_unless_finite(call.query)
    shown = ~jnp.isnan(bad) & seen
    query = jnp.where(shown, call.query, jnp.zeros_like(call.query))
    rows = None if call.rows is None else jnp.where(shown, call.rows, jnp.zeros_like(call.rows))
    return query, rows, bad.swapaxes(1, 2).astype(call.high)


def _nan_unless_finite(columns: Columns, num_heads: int) -> Array:
    """0 for each key, or NaN where it stands for one that was not finite: `[B, 1 or N, 1, S]`."""
    finite = columns.finite[:, None] if columns.finite.ndim == 2 else columns.finite
    by_head = finite if finite.shape[1] == 1 else jnp.repeat(finite, num_heads // finite.shape[1], axis=1)
    return jnp.where(by_head, 0.0, jnp.nan)[:, :, None]


def _product(subscripts: str, left: Array, right: Array, high: Any) -> Array:
    return jnp.einsum(subscripts, left, right, precision=lax.Precision.HIGHEST, preferred_element_type=high)
