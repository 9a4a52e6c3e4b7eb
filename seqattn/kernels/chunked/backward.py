"""The backward pass of FlashAttention-2 (Dao 2023, algorithm 2): weights are computed again from the log-sum-exp."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from seqattn.kernels.chunked import layouts, operands
from seqattn.kernels.chunked.layouts import At
from seqattn.kernels.chunked.operands import zero_unless_finite
from seqattn.kernels.chunked.plan import Leaves, Plan
from seqattn.kernels.chunked.tile_loop import Carry, visit
from seqattn.kernels.chunked.tile_scores import Place, TileScores, dropped, product
from seqattn.kernels.traced import TracedMod


def backward(
    plan: Plan, leaves: Leaves, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> dict[str, Any]:
    """The gradients by what is floating in a `Call`, by its name and in float32 at least; of the score_mod, a list.

    What `finish` gave may count the keys of other calls, too: then these are the parts due to this one.
    """
    call = plan.call(leaves)
    grid, high = plan.grid, call.high
    given = operands.of_gradients(grid, call, output, peak, log_total, d_output, d_lse)
    by_query = {
        "query": jnp.zeros(given["query"].shape, high),
        "rows": None if call.rows is None else jnp.zeros(given["rows"].shape, high),
    }
    by_key = {name: jnp.zeros(given[name].shape, high) for name in ("key", "value")}
    by_pair = None if call.bias is None else jnp.zeros(given["bias"].shape, high)
    whole = [jnp.zeros(x.shape, high) for x in arrays_of(call.score_mod)]

    def step(carry: Carry, at: At, partial: bool) -> Carry:
        by_query, by_key, by_pair, whole = carry
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
    unscaled = layouts.from_columns(grid, by_query["query"])
    outer = call.scale if call.inner_scale is None else 1
    return {
        "query": unscaled * call.scale,
        "key": layouts.from_key_rows(grid, by_key["key"]) * outer,
        "value": layouts.from_key_rows(grid, by_key["value"]),
        "scale": jnp.sum(unscaled * zero_unless_finite(call.query).astype(high)),
        "bias": None if call.bias is None else by_pair[:, :, : call.bias.shape[2], : call.bias.shape[3]],
        "rows": None if by_query["rows"] is None else layouts.from_query_rows(grid, by_query["rows"]),
        "score_mod": whole,
    }


def with_gradients(call: Any, gradients: dict[str, Any]) -> Any:
    """A call with what `backward` returns in the place of its arrays, and zeros elsewhere."""
    zeros = jax.tree.map(jnp.zeros_like, call)
    mod = None if zeros.score_mod is None else zeros.score_mod.with_arrays(gradients["score_mod"])
    return dataclasses.replace(zeros, **gradients | {"score_mod": mod})


def arrays_of(mod: TracedMod | None) -> list[Array]:
    """The arrays of a score modification that have gradients."""
    return [] if mod is None else mod.arrays


def _of_tile(plan: Plan, place: Place) -> dict[str, Any]:
    """What the pairs of a tile add to the gradients, by the names of `backward`; of the query before the scale."""
    dtype, high = place.call.query.dtype, place.call.high
    # The weights, again: exp(score - log-sum-exp).
    scores = TileScores.of(place, gradients=True)
    weights = jnp.exp(scores.values - place.of_queries("peak")[:, None] - place.of_queries("log_total")[:, None])
    weights = lax.optimization_barrier(scores.shown(weights))
    # Through the softmax: its derivative needs the sum of output times gradient of each row, `delta`.
    d_weights = product("lsv,lvt->lst", place.key_rows("value"), place.of_queries("d_output"), high)
    d_weights = dropped(plan, place, d_weights)
    d_scores = scores.shown(weights * (d_weights - place.of_queries("delta")[:, None]))
    d_products, d_bias, d_rows, d_mod = scores.pull_back(d_scores)
    d_products = lax.optimization_barrier(d_products.astype(dtype))
    weights = dropped(plan, place, weights).astype(dtype)
    return {
        "query": product("lhs,lst->lht", place.key_columns("key_columns"), d_products, high),
        "key": product("lst,lth->lsh", d_products, place.of_queries("query_rows"), high),
        "value": product("lst,ltv->lsv", weights, place.of_queries("d_output_rows"), high),
        "bias": d_bias,
        "rows": d_rows,
        "score_mod": d_mod,
    }
