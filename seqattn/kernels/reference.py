"""Attention written once, plainly: `softmax(q . k) v` with all scores in memory. It defines the meaning.

A kernel takes a `Call` and returns the output `[B, T, N, V]` in the query's dtype and the log-sum-exp `[B, T, N]` in
float32 at least. The order is `scale * query . key + bias`, then the score modification, then the mask. A kernel that
cannot serve a call raises NotImplementedError with the reason.

The contract, which every kernel keeps:
- a row that may attend to nothing gives zeros, zero gradients, and the lowest number as its log-sum-exp, which
  `seqattn.attend` turns into -inf;
- nothing that is computed of finite numbers is NaN or infinite, for `jax.debug_nans` and `jax.debug_infs`;
- what a masked key, a masked value or the query of an empty row holds (NaN, Inf) leaves no trace, forward or backward;
- a visible key or value that is not finite makes the row NaN, also where dropout drops its weight;
- a score of -inf, by a bias or by a score modification, masks the pair; the latter sees a score of 0 where masked;
- dropout keeps the weight of query t and key s where `Dropout.keep((b * N + n) * T + t, s)` does;
- the softmax, the log-sum-exp and all sums are float32 at least.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels.call import Call, Result
from seqattn.mask import Mask
from seqattn.precision import lowest
from seqattn.sizes import Size


def refuse(call: Call) -> None:
    """Refuses no call."""


def attend(call: Call) -> Result:
    """The output and the log-sum-exp of the logits (see the contract above)."""
    scored, visible = logits(call)
    output, _, lse = mix(scored, call.value, visible, dropout=call.dropout)
    return output.astype(call.query.dtype), lse.swapaxes(1, 2)


def visibility(
    query: tuple[Size, ...],
    mask: Mask | Bool[Array, "..."] | None,
    bias: Float[Array, "..."] | None,
    q_at: Coordinates,
    kv_at: Coordinates,
) -> Bool[Array, "..."] | None:
    """Mask and biases of -inf as one array that broadcasts to `[B, N, T, S]`, or None where all may attend.

    `query` is the shape `[B, T, N, H]`.
    """
    visible = mask.over(q_at, kv_at, batch=query[0], num_heads=query[2]) if isinstance(mask, Mask) else mask
    if bias is None:
        return visible
    allowed = bias != -jnp.inf
    return allowed if visible is None else visible & allowed


def logits(call: Call) -> tuple[Float[Array, "B N T S"], Bool[Array, "..."] | None]:
    """Scaled products plus bias, modified, and who may attend: a score modification may hide pairs, too.

    What the logits hold where a pair is hidden means nothing; elsewhere they are NaN where query or key is not finite.
    """
    query, key, bias, rows, high = call.query, call.key, call.bias, call.rows, call.high
    visible = visibility(query.shape, call.mask, bias, call.q_at, call.kv_at)
    batch, length, num_heads, _ = query.shape
    num_kv_heads = key.shape[2]
    # What is not finite is computed with as 0, and marked in the end: a score modification, too, may hide the pair.
    bad_query, bad_key = nan_unless_finite(query), nan_unless_finite(key)
    shown = ~jnp.isnan(bad_query)
    if visible is not None:
        shown = shown & jnp.swapaxes(visible.any(axis=-1), 1, 2)[..., None]
    query = jnp.where(shown, query, jnp.zeros_like(query))
    key = jnp.where(jnp.isnan(bad_key), jnp.zeros_like(key), key)
    grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, query.shape[-1])
    product = _product("btkgh,bskh->bkgts", grouped.astype(high), key.astype(high)) * jnp.asarray(call.scale, high)
    scored = product.reshape(batch, num_heads, length, key.shape[1])
    if bias is not None:
        bias = jnp.where(bias == -jnp.inf, jnp.zeros_like(bias), bias)
        scored = scored + jnp.broadcast_to(bias, scored.shape).astype(high)
    if call.score_mod is not None:
        scored = scored if visible is None else jnp.where(visible, scored, jnp.zeros_like(scored))
        rows = None if rows is None else jnp.where(shown, rows, jnp.zeros_like(rows))
        scored = call.score_mod.over(scored, call.q_at, call.kv_at, jnp.arange(num_heads, dtype=jnp.int32), rows)
        allowed = scored != -jnp.inf
        visible = allowed if visible is None else visible & allowed
    return scored + _column(bad_key, num_heads).astype(high) + bad_query.swapaxes(1, 2).astype(high), visible


def mix(
    scored: Float[Array, "B N T S"],
    value: Float[Array, "B S K V"],
    visible: Bool[Array, "..."] | None,
    *,
    dropout: Dropout | None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T S"], Float[Array, "B N T"]]:
    """The values weighted by the softmax of the visible logits: output, weights (before dropout) and log-sum-exp.

    What a hidden value holds leaves no trace, and a visible one that is not finite makes its row NaN.
    """
    batch, num_heads, length, size = scored.shape
    num_kv_heads, bad = value.shape[2], nan_unless_finite(value)
    value = jnp.where(jnp.isnan(bad), jnp.zeros_like(value), value).astype(scored.dtype)
    weights, lse = softmax(scored + _column(bad, num_heads).astype(scored.dtype), visible)
    grouped = _dropped(weights, dropout).reshape(batch, num_kv_heads, num_heads // num_kv_heads, length, size)
    output = _product("bkgts,bskv->btkgv", grouped, value)
    return output.reshape(batch, length, num_heads, value.shape[-1]), weights, lse


def softmax(
    scored: Float[Array, "*batch S"], visible: Bool[Array, "..."] | None
) -> tuple[Float[Array, "*batch S"], Float[Array, "*batch"]]:
    """Softmax and log-sum-exp over what is visible on the last axis; an empty row has weights 0 and `lowest`."""
    hidden = lowest(scored.dtype)
    if visible is not None:
        scored = jnp.where(visible, scored, jnp.full_like(scored, hidden))
    peak = jax.lax.stop_gradient(scored.max(axis=-1, keepdims=True, initial=hidden))
    exponentials = jnp.exp(scored - peak)
    if visible is not None:
        exponentials = jnp.where(visible, exponentials, jnp.zeros_like(exponentials))
    total = exponentials.sum(axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, jnp.ones_like(total), total)
    return exponentials / total, log_sum_exp(peak + jnp.log(total), empty)[..., 0]


def log_sum_exp(lse: Float[Array, "..."], empty: Bool[Array, "..."]) -> Float[Array, "..."]:
    """The log-sum-exp as kernels return it: `lowest` where a row is empty, and nowhere else.

    A row of logits that are all that low (by a bias, say) gets the next number, a rounding away.
    """
    bounds = np.finfo(lse.dtype).min, np.nextafter(np.finfo(lse.dtype).min, 0, dtype=lse.dtype)
    lse = lse + jax.lax.stop_gradient(jnp.maximum(lse, bounds[1]) - lse)
    return jnp.where(empty, bounds[0], lse)


def nan_unless_finite(x: Float[Array, "*shape D"]) -> Float[Array, "*shape 1"]:
    """0, or NaN for a vector that is not finite."""
    # Without the barrier XLA might find the product to be 0.
    zeros = jax.lax.optimization_barrier(jnp.zeros_like(x[..., :1]))
    return jnp.sum(jax.lax.stop_gradient(x) * zeros, axis=-1, keepdims=True)


def _product(subscripts: str, left: Array, right: Array) -> Array:
    """A sum of products in the full precision of its dtype, which accelerators do not give by default."""
    return jnp.einsum(subscripts, left, right, precision=jax.lax.Precision.HIGHEST)


def _column(of_keys: Float[Array, "B S K 1"], num_heads: int) -> Float[Array, "B N 1 S"]:
    """What is known of each key, for each query head that reads it."""
    return jnp.repeat(of_keys, num_heads // of_keys.shape[2], axis=2).transpose(0, 2, 3, 1)


def _dropped(weights: Float[Array, "B N T S"], dropout: Dropout | None) -> Float[Array, "B N T S"]:
    if dropout is None or dropout.rate == 0:
        return weights
    batch, num_heads, length, size = weights.shape
    row = jnp.arange(batch * num_heads * length, dtype=jnp.uint32).reshape(batch, num_heads, length, 1)
    keep = dropout.keep(row, jnp.arange(size, dtype=jnp.uint32).reshape(1, 1, 1, size))
    # Of a row that is NaN every weight stays NaN, dropped or not.
    return jnp.where(keep, weights / (1 - dropout.rate), weights * 0)
