"""Reference attention with all scores in memory. It defines the contract that every kernel keeps.

A kernel takes a `Call` and returns the output `[B, T, N, V]` in the query's dtype and the log-sum-exp `[B, T, N]` in
float32 or wider. The order is `scale * query . key + bias`, then the score modification, then the mask. A kernel that
cannot serve a call raises NotImplementedError with the reason.

The contract:

- A fully masked row gives zeros, zero gradients, and the lowest finite number as its log-sum-exp, which
  `seqattn.attend` replaces by -inf.
- No intermediate result of finite inputs is NaN or infinite, so `jax.debug_nans` and `jax.debug_infs` stay silent.
- NaN or Inf in a masked key, a masked value or the query of a fully masked row changes no output and no gradient.
- NaN or Inf in a visible key or value makes the row NaN, even if dropout drops its weight.
- A score of -inf, from a bias or a score modification, masks the pair. A score modification sees a score of 0 for a
  masked pair.
- Dropout keeps the weight of query t and key s if `Dropout.keep((b * N + n) * T + t, s)` is True.
- The softmax, the log-sum-exp and all sums are computed in float32 or wider.
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
    """Accepts every call."""


def attend(call: Call) -> Result:
    """Returns the output and the log-sum-exp of the logits, as the contract of this module says."""
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
    """Returns the visible pairs, from the mask and the biases of -inf, or None if all pairs are visible.

    Args:
        query: the shape of the queries, `[B, T, N, H]`.
        mask: a `Mask`, a boolean array `[B or 1, N or 1, T or 1, S or 1]`, or None.
        bias: an array of the same form, or None.
        q_at: coordinates of the queries, `[B or 1, T]`.
        kv_at: coordinates of the keys, `[B or 1, S]`.

    Returns:
        A boolean array that broadcasts to `[B, N, T, S]`, or None.
    """
    visible = mask.over(q_at, kv_at, batch=query[0], num_heads=query[2]) if isinstance(mask, Mask) else mask
    if bias is None:
        return visible
    allowed = bias != -jnp.inf
    return allowed if visible is None else visible & allowed


def logits(call: Call) -> tuple[Float[Array, "B N T S"], Bool[Array, "..."] | None]:
    """Returns the logits (scaled products plus bias, modified) and the visible pairs.

    A score modification may mask further pairs. Logits of masked pairs are undefined. Logits of visible pairs are NaN
    if the query or the key is not finite.
    """
    query, key, bias, rows, high = call.query, call.key, call.bias, call.rows, call.high
    visible = visibility(query.shape, call.mask, bias, call.q_at, call.kv_at)
    batch, length, num_heads, _ = query.shape
    num_kv_heads = key.shape[2]
    # Non-finite vectors are replaced by 0 here and marked with NaN at the end, because a score modification may still
    # mask the pair. `jnp.where` on the result would not do: its gradient is 0 * NaN = NaN.
    bad_query, bad_key = nan_unless_finite(query), nan_unless_finite(key)
    # The query of a fully masked row is replaced, too: its gradient is exactly 0 then.
    shown = ~jnp.isnan(bad_query)
    if visible is not None:
        shown = shown & jnp.swapaxes(visible.any(axis=-1), 1, 2)[..., None]
    query = jnp.where(shown, query, jnp.zeros_like(query))
    key = jnp.where(jnp.isnan(bad_key), jnp.zeros_like(key), key)
    # Query head n reads key head n // group (Ainslie 2023). The extra axis spares a repeated copy of the keys.
    grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, query.shape[-1])
    product = _product("btkgh,bskh->bkgts", grouped.astype(high), key.astype(high)) * jnp.asarray(call.scale, high)
    scored = product.reshape(batch, num_heads, length, key.shape[1])
    if bias is not None:
        # A bias of -inf has masked its pair above. As a number it would make the gradient NaN.
        bias = jnp.where(bias == -jnp.inf, jnp.zeros_like(bias), bias)
        scored = scored + jnp.broadcast_to(bias, scored.shape).astype(high)
    if call.score_mod is not None:
        # The modification sees 0 for a masked pair, so that no masked value reaches its arrays' gradients.
        scored = scored if visible is None else jnp.where(visible, scored, jnp.zeros_like(scored))
        rows = None if rows is None else jnp.where(shown, rows, jnp.zeros_like(rows))
        scored = call.score_mod.over(scored, call.q_at, call.kv_at, jnp.arange(num_heads, dtype=jnp.int32), rows)
        allowed = scored != -jnp.inf
        visible = allowed if visible is None else visible & allowed
    # Adding 0 or NaN marks the visible pairs without a branch; the softmax discards the marks of masked ones.
    return scored + _column(bad_key, num_heads).astype(high) + bad_query.swapaxes(1, 2).astype(high), visible


def mix(
    scored: Float[Array, "B N T S"],
    value: Float[Array, "B S K V"],
    visible: Bool[Array, "..."] | None,
    *,
    dropout: Dropout | None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T S"], Float[Array, "B N T"]]:
    """Averages the values with the softmax of the visible logits.

    NaN or Inf in a masked value has no effect; in a visible value it makes the row NaN.

    Returns:
        The output, the weights before dropout, and the log-sum-exp.
    """
    batch, num_heads, length, size = scored.shape
    num_kv_heads, bad = value.shape[2], nan_unless_finite(value)
    # A weight of 0 times NaN is NaN, so the NaN of a value must travel with its logit, which the mask can hide.
    value = jnp.where(jnp.isnan(bad), jnp.zeros_like(value), value).astype(scored.dtype)
    weights, lse = softmax(scored + _column(bad, num_heads).astype(scored.dtype), visible)
    grouped = _dropped(weights, dropout).reshape(batch, num_kv_heads, num_heads // num_kv_heads, length, size)
    output = _product("bkgts,bskv->btkgv", grouped, value)
    return output.reshape(batch, length, num_heads, value.shape[-1]), weights, lse


def softmax(
    scored: Float[Array, "*batch S"], visible: Bool[Array, "..."] | None
) -> tuple[Float[Array, "*batch S"], Float[Array, "*batch"]]:
    """Computes softmax and log-sum-exp over the visible entries of the last axis.

    A fully masked row has weights of 0 and the log-sum-exp `lowest`.
    """
    hidden = lowest(scored.dtype)
    if visible is not None:
        scored = jnp.where(visible, scored, jnp.full_like(scored, hidden))
    # Subtracting the maximum keeps exp in range. It cancels in the result, so it needs no gradient.
    peak = jax.lax.stop_gradient(scored.max(axis=-1, keepdims=True, initial=hidden))
    exponentials = jnp.exp(scored - peak)
    if visible is not None:
        # In a fully masked row all logits equal the maximum and exp gives 1, so the mask must be applied again.
        exponentials = jnp.where(visible, exponentials, jnp.zeros_like(exponentials))
    total = exponentials.sum(axis=-1, keepdims=True)
    empty = total == 0
    # Division by 1 instead of 0 gives zeros, and no NaN in the gradient.
    total = jnp.where(empty, jnp.ones_like(total), total)
    return exponentials / total, log_sum_exp(peak + jnp.log(total), empty)[..., 0]


def log_sum_exp(lse: Float[Array, "..."], empty: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Returns the log-sum-exp as kernels return it: `lowest` for a fully masked row, and for no other row.

    A visible row whose logits are all that low gets the next larger number, one rounding step away.
    """
    bounds = np.finfo(lse.dtype).min, np.nextafter(np.finfo(lse.dtype).min, 0, dtype=lse.dtype)
    # The clamp adds a constant without a gradient, so the derivative stays that of the log-sum-exp.
    lse = lse + jax.lax.stop_gradient(jnp.maximum(lse, bounds[1]) - lse)
    return jnp.where(empty, bounds[0], lse)


def nan_unless_finite(x: Float[Array, "*shape D"]) -> Float[Array, "*shape 1"]:
    """Returns 0 for a finite vector and NaN for any other."""
    # Inf * 0 and NaN * 0 are NaN. Without the barrier XLA may simplify x * 0 to 0.
    zeros = jax.lax.optimization_barrier(jnp.zeros_like(x[..., :1]))
    return jnp.sum(jax.lax.stop_gradient(x) * zeros, axis=-1, keepdims=True)


def _product(subscripts: str, left: Array, right: Array) -> Array:
    """Computes a sum of products in the full precision of its dtype, which accelerators do not use by default."""
    return jnp.einsum(subscripts, left, right, precision=jax.lax.Precision.HIGHEST)


def _column(of_keys: Float[Array, "B S K 1"], num_heads: int) -> Float[Array, "B N 1 S"]:
    """Returns a number of each key for each query head that reads it."""
    return jnp.repeat(of_keys, num_heads // of_keys.shape[2], axis=2).transpose(0, 2, 3, 1)


def _dropped(weights: Float[Array, "B N T S"], dropout: Dropout | None) -> Float[Array, "B N T S"]:
    """Applies dropout to the weights."""
    if dropout is None or dropout.rate == 0:
        return weights
    batch, num_heads, length, size = weights.shape
    # Row and column are the counter of the random generator: tiled kernels drop the same weights.
    row = jnp.arange(batch * num_heads * length, dtype=jnp.uint32).reshape(batch, num_heads, length, 1)
    keep = dropout.keep(row, jnp.arange(size, dtype=jnp.uint32).reshape(1, 1, 1, size))
    # `weights * 0` instead of 0 keeps a NaN row NaN in the dropped places as well.
    return jnp.where(keep, weights / (1 - dropout.rate), weights * 0)
