"""The forward pass on a TPU: an online softmax over the tiles of keys (Milakov 2018; Dao 2023)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from seqattn.kernels.blocks import FIRST, FULL, KIND, LAST, PARTIAL
from seqattn.kernels.finite import marked, marked_query, nan_unless_finite, zero_unless_finite
from seqattn.kernels.log_total import SEES_NOTHING
from seqattn.kernels.tpu import inputs as kernel_inputs
from seqattn.kernels.tpu.inputs import Inputs, Place, in_heads
from seqattn.kernels.tpu.plan import Operands, Plan
from seqattn.kernels.tpu.tile import Tile, dot, ids
from seqattn.precision import lowest

_LANES = 128
"""Numbers for each query are kept in all 128 lanes of a vector, so that no step has to spread them."""


def forward(plan: Plan, operands: Operands, *, parts: bool) -> tuple[Array, ...]:
    """Returns the output `[B, T, N, V]`, and the log-sum-exp `[B, N, T]` or its two parts.

    Args:
        plan: the static part of the call.
        operands: its arrays.
        parts: return the largest logit of each row and the log of the sum of `exp(logit - largest)`, as the tiled
            kernel does. The backward pass reads both. A call without gradients needs their sum alone.
    """
    batch, num_heads, _, length, _, _, value_dim = plan.sizes
    place = Place(plan, transposed=False)
    queries = plan.padded[0]
    row = jax.ShapeDtypeStruct((batch, num_heads, 1, queries), jnp.float32)
    whole = jax.ShapeDtypeStruct((batch, num_heads, queries, value_dim), plan.dtype)
    vector = place.vector(row.shape, of_query=True)
    output, *rows = kernel_inputs.call(
        functools.partial(_step, place),
        _inputs(place, operands),
        operands.lists(transposed=False),
        [(whole, place.by_query(value_dim)), *[(row, vector)] * (1 + parts)],
        [
            pltpu.VMEM((plan.tiles.queries, value_dim), jnp.float32),
            pltpu.VMEM((plan.tiles.queries, _LANES), jnp.float32),
            pltpu.VMEM((plan.tiles.queries, _LANES), jnp.float32),
        ],
        dims=plan.sizes[5] + value_dim,
    )
    return output[:, :, :length].swapaxes(1, 2), *(x[:, :, 0, :length] for x in rows)


def _inputs(place: Place, operands: Operands) -> Inputs:
    """Returns what the kernel reads: keys are NaN where they must make a row NaN, values 0 there."""
    plan, inputs = place.plan, kernel_inputs.of_scores(place, operands)
    queries, keys = plan.padded
    key, value = marked(operands.key, operands.value)
    query = marked_query(operands.query)
    if plan.score_mod is not None:
        # A score modification works on finite scores, and NaN is added after it.
        bad = (nan_unless_finite(x)[..., 0].swapaxes(1, 2).astype(jnp.float32) for x in (query, key))
        inputs.vectors("bad_query", next(bad), of_query=True)
        inputs.vectors("bad_key", next(bad), of_query=False, kv_heads=True)
        query, key = zero_unless_finite(query), zero_unless_finite(key)
    inputs.rows("query", in_heads(query, queries, repeats=True), place.by_query(query.shape[-1]))
    inputs.rows("key", in_heads(key, keys, repeats=True), place.by_key(key.shape[-1]))
    inputs.rows("value", in_heads(value, keys), place.by_key(value.shape[-1]))
    return inputs


def _step(place: Place, refs: dict[str, Any], results: Any, scratch: Any) -> None:
    """Adds one tile to the accumulators of its queries."""
    at = ids(3)
    flags = refs["flags"][at[2]]
    output, peak, total = scratch

    @pl.when(flags & FIRST != 0)
    def _() -> None:
        # The maximum starts at the lowest finite number instead of -inf: -inf - -inf would be NaN in the first update.
        output[...] = jnp.zeros_like(output)
        peak[...] = jnp.full_like(peak, lowest(jnp.float32))
        total[...] = jnp.zeros_like(total)

    for kind in (PARTIAL, FULL):
        tile = Tile(place, refs, at, kind == PARTIAL)
        # The body of full tiles contains no mask at all.
        pl.when(flags & kind * KIND != 0)(functools.partial(_add, tile, output, peak, total))

    @pl.when(flags & LAST != 0)
    def _() -> None:
        # A visible logit adds exp(0) = 1 at the maximum, so only fully masked rows have a total of 0.
        empty = total[:, :1] == 0
        whole = jnp.where(empty, 1.0, total[:, :1])
        # One division at the end instead of one in each step (Dao 2023, section 3.1).
        results[0][...] = (output[...] / whole).astype(results[0].dtype)
        if len(results) == 3:
            results[1][...] = peak[:, :1].T
            results[2][...] = jnp.where(empty, SEES_NOTHING, jnp.log(whole)).T
            return
        # As `lse_of`: `lowest` tells a fully masked row, so no other row is as low. A comparison with NaN is False.
        lse, least = peak[:, :1] + jnp.log(whole), float(np.nextafter(lowest(jnp.float32), 0, dtype=np.float32))
        lse = jnp.where(lse < least, least, lse)
        results[1][...] = jnp.where(empty, lowest(jnp.float32), lse).T


def _add(tile: Tile, output: Any, peak: Any, total: Any) -> None:
    """Adds a tile that has a visible pair."""
    scores, _, _ = tile.logits(gradients=False)
    # The running maximum of Milakov 2018, algorithm 3: m_j = max(m_{j-1}, x_j).
    top = jnp.maximum(peak[...], jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - top[:, :1])
    # Sums under the old maximum are rescaled to the new one: d_j = d_{j-1} * exp(m_{j-1} - m_j) + ...
    shrink = jnp.exp(peak[...] - top)
    total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    peak[...] = top
    # Dropout acts on the weights after the softmax: the total above keeps the dropped ones. The product runs in the
    # dtype of the values, as in FlashAttention; its sum is float32.
    value = tile.refs["value"][...]
    weights = tile.dropped(weights).astype(value.dtype)
    output[...] = output[...] * shrink[:, :1] + dot(weights, value, 1, 0)
