"""The backward pass of FlashAttention-2 (Dao 2023, algorithm 2), which recomputes the weights from the log-sum-exp."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from seqattn.kernels.chunked import layouts, operands
from seqattn.kernels.chunked.layouts import At
from seqattn.kernels.chunked.plan import Leaves, Plan
from seqattn.kernels.chunked.tile_loop import Carry, visit
from seqattn.kernels.chunked.tile_scores import Place, TileScores, dropped, product
from seqattn.kernels.finite import zero_unless_finite
from seqattn.kernels.traced import TracedMod


def backward(
    plan: Plan, leaves: Leaves, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> dict[str, Any]:
    """Returns the gradients with respect to the floating arrays of a `Call`, by name, in float32 or wider.

    The gradients of the score modification are a list. The arguments from `finish` may cover the keys of other calls,
    too, as in the ring: the results are then the contributions of this call's keys.
    """
    call = plan.call(leaves)
    grid, high = plan.grid, call.high
    # Everything a tile reads is laid out once, before the loop. `delta` is D of algorithm 2, line 4.
    given = operands.of_gradients(grid, call, output, peak, log_total, d_output, d_lse)
    by_query = {
        "query": jnp.zeros(given["query"].shape, high),
        "rows": None if call.rows is None else jnp.zeros(given["rows"].shape, high),
    }
    # Gradients are accumulated in float32 or wider: each query adds up one part per key tile, each key one per query
    # tile.
    by_key = {name: jnp.zeros(given[name].shape, high) for name in ("key", "value")}
    by_pair = None if call.bias is None else jnp.zeros(given["bias"].shape, high)
    whole = [jnp.zeros(x.shape, high) for x in arrays_of(call.score_mod)]

    def step(carry: Carry, at: At, partial: bool) -> Carry:
        by_query, by_key, by_pair, whole = carry
        # Tiles share queries and keys, so each step adds to its slices of the accumulators.
        lanes, i, block = at
        d = _of_tile(plan, Place(grid, call, given, at, partial))
        by_query = {
            "query": layouts.add(grid, by_query["query"], d["query"], i, lanes),
            "rows": None if d["rows"] is None else layouts.add(grid, by_query["rows"], d["rows"], i, lanes),
        }
        by_key = {name: layouts.add_key_rows(grid, by_key[name], d[name], lanes, block) for name in ("key", "value")}
        by_pair = None if d["bias"] is None else layouts.add_pairs(grid, by_pair, d["bias"], at)
        return by_query, by_key, by_pair, [a + b.astype(a.dtype) for a, b in zip(whole, d["score_mod"], strict=True)]

    by_query, by_key, by_pair, whole = visit(call, step, (by_query, by_key, by_pair, whole))
    # The query was scaled outside the products or inside them (`inner_scale`). Undoing the layout first gives d(scale *
    # q) once, from which both d_query and d_scale follow.
    unscaled = layouts.from_columns(grid, by_query["query"])
    # With an inner scale the key's gradient came from scaled queries and already contains the scale.
    outer = call.scale if call.inner_scale is None else 1
    return {
        "query": unscaled * call.scale,
        "key": layouts.from_key_rows(grid, by_key["key"]) * outer,
        "value": layouts.from_key_rows(grid, by_key["value"]),
        # Non-finite queries are replaced by zeros: NaN * 0 would carry a masked query into the scale's gradient.
        "scale": jnp.sum(unscaled * zero_unless_finite(call.query).astype(high)),
        # Padding pairs have zero gradients, so they can be cut off.
        "bias": None if call.bias is None else by_pair[:, :, : call.bias.shape[2], : call.bias.shape[3]],
        "rows": None if by_query["rows"] is None else layouts.from_query_rows(grid, by_query["rows"]),
        "score_mod": whole,
    }


def with_gradients(call: Any, gradients: dict[str, Any]) -> Any:
    """Returns the call with its arrays replaced by the gradients that `backward` returned, and by zeros elsewhere."""
    zeros = jax.tree.map(jnp.zeros_like, call)
    mod = None if zeros.score_mod is None else zeros.score_mod.with_arrays(gradients["score_mod"])
    return dataclasses.replace(zeros, **gradients | {"score_mod": mod})


def arrays_of(mod: TracedMod | None) -> list[Array]:
    """Returns the arrays of a score modification that have gradients."""
    return [] if mod is None else mod.arrays


def _of_tile(plan: Plan, place: Place) -> dict[str, Any]:
    """Returns the contribution of one tile to the gradients, by the names of `backward`; the query's is unscaled."""
    dtype, high = place.call.query.dtype, place.call.high
    # P = exp(S - L), algorithm 2, line 11. Subtracting the two parts of L one by one keeps the small part exact.
    scores = TileScores.of(place, gradients=True)
    weights = jnp.exp(scores.values - place.of_queries("peak")[:, None] - place.of_queries("log_total")[:, None])
    # The barrier keeps XLA from recomputing the exponentials for each of the products that read them. Hidden pairs get
    # exact zeros: in a NaN row their exponentials are NaN as well, which must not reach a masked key.
    weights = lax.optimization_barrier(scores.shown(weights))
    # dP = dO V^T, line 13. Dropout scales it by the same mask as the weights in the forward pass.
    d_weights = product("lsv,lvt->lst", place.key_rows("value"), place.of_queries("d_output"), high)
    d_weights = dropped(plan, place, d_weights)
    # The derivative of the softmax, dS = P * (dP - D) with D = rowsum(dO * O), line 14. D replaces the sum over all
    # keys, which no single tile knows.
    d_scores = scores.shown(weights * (d_weights - place.of_queries("delta")[:, None]))
    # Back through score modification and bias to the products themselves.
    d_products, d_bias, d_rows, d_mod = scores.pull_back(d_scores)
    # Both matrix products below read dS in the inputs' dtype: one rounding, computed once.
    d_products = lax.optimization_barrier(d_products.astype(dtype))
    # The value's gradient needs the weights after dropout, as they multiplied the values.
    weights = dropped(plan, place, weights).astype(dtype)
    # Lines 12, 15 and 16: dV += P^T dO, dQ += dS K, dK += dS^T Q.
    return {
        "query": product("lhs,lst->lht", place.key_columns("key_columns"), d_products, high),
        "key": product("lst,lth->lsh", d_products, place.of_queries("query_rows"), high),
        "value": product("lst,ltv->lsv", weights, place.of_queries("d_output_rows"), high),
        "bias": d_bias,
        "rows": d_rows,
        "score_mod": d_mod,
    }
