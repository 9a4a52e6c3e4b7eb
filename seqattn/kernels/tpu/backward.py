"""The backward pass on a TPU (Dao 2023, algorithm 2): one kernel for the queries' gradients, one for keys and values.

Each result belongs to one outer tile of its kernel, so no two steps of the grid add to the same memory: the sums are
deterministic. Both recompute the weights of a tile from the log-sum-exp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from seqattn.kernels.blocks import FIRST, FULL, KIND, LAST, PARTIAL
from seqattn.kernels.finite import marked, zero_unless_finite
from seqattn.kernels.tpu import inputs as kernel_inputs
from seqattn.kernels.tpu.inputs import Inputs, Place, in_heads
from seqattn.kernels.tpu.plan import Operands, Plan
from seqattn.kernels.tpu.tile import Tile, dot, ids

_LANES = 128


def backward(
    plan: Plan, operands: Operands, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> dict[str, Any]:
    """Returns the gradients of query, key, value, scale and of the borders of the score modification, by name."""
    # D = rowsum(dO * O) of algorithm 2, line 4. The gradient of the log-sum-exp with respect to a score is its weight,
    # so d_lse enters the same bracket: dS = P * (dP - (D - d_lse)).
    delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), axis=-1) - d_lse
    rows = {"peak": peak, "log_total": log_total, "delta": delta.swapaxes(1, 2)}
    d_query, d_scalars = _of_queries(plan, operands, d_output, rows)
    d_key, d_value = _of_keys(plan, operands, d_output, rows)
    return {
        "query": d_query,
        "key": d_key,
        "value": d_value,
        "scale": jnp.sum(d_scalars[..., 0]),
        "mod": _of_borders(plan, operands, d_scalars),
    }


def _of_borders(plan: Plan, operands: Operands, d_scalars: Array) -> list[Array]:
    """Returns the gradients of the borders, `[B or 1, N or 1, L]`, from those of each batch row and head."""
    # The first of the scalars is the gradient of the scale.
    found, first = [jnp.zeros(x.shape, x.dtype) for x in operands.mod], 1
    for i, number in plan.trained:
        shape = operands.mod[i].shape
        each = d_scalars[:, :, 0, first : first + number]
        summed = each.sum(axis=[axis for axis in range(2) if shape[axis] == 1 != each.shape[axis]], keepdims=True)
        found[i], first = summed.reshape(shape), first + number
    return found


def _inputs(place: Place, operands: Operands, d_output: Array, rows: dict[str, Array]) -> Inputs:
    """Returns what both kernels read. Non-finite vectors are 0: their rows are NaN by the log-sum-exp."""
    plan, inputs = place.plan, kernel_inputs.of_scores(place, operands)
    queries, keys = plan.padded
    key, value = marked(operands.key, operands.value)
    of_queries = {"query": zero_unless_finite(operands.query), "d_output": d_output}
    of_keys = {"key": zero_unless_finite(key), "value": value}
    for name, x in of_queries.items():
        inputs.rows(name, in_heads(x, queries, repeats=name == "query"), place.by_query(x.shape[-1]))
    for name, x in of_keys.items():
        inputs.rows(name, in_heads(x, keys, repeats=name == "key"), place.by_key(x.shape[-1]))
    for name, x in rows.items():
        # Padding queries get a maximum of +inf, so that their weights are exp(-inf) = 0.
        filler = jnp.inf if name == "peak" else 0.0
        behind = ((0, 0), (0, 0), (0, queries - x.shape[2]))
        inputs.vectors(name, jnp.pad(x, behind, constant_values=filler), of_query=True)
    return inputs


def _of_queries(plan: Plan, operands: Operands, d_output: Array, rows: dict[str, Array]) -> tuple[Array, Array]:
    """Returns the gradient of the queries, `[B, T, N, H]`, and those of the scalars of each row and head.

    The latter are `[B, N, 1, L]`; the first is the scale.
    """
    batch, num_heads, _, length, _, head_dim, _ = plan.sizes
    place = Place(plan, transposed=False)
    number = 1 + sum(entries for _, entries in plan.trained)
    width = -(-number // _LANES) * _LANES
    query = jax.ShapeDtypeStruct((batch, num_heads, plan.padded[0], head_dim), plan.dtype)
    scalars = jax.ShapeDtypeStruct((batch, num_heads, 1, width), jnp.float32)

    def whole_row(*given: Any) -> tuple[Any, ...]:
        at, lists = given[:3], given[3:]
        return place.row(at, lists), place.head(at), 0, 0

    d_query, d_scalars = kernel_inputs.call(
        functools.partial(_step_of_queries, place),
        _inputs(place, operands, d_output, rows),
        operands.lists(transposed=False),
        [(query, place.by_query(head_dim)), (scalars, pl.BlockSpec((None, None, 1, width), whole_row))],
        [pltpu.VMEM((plan.tiles.queries, head_dim), jnp.float32)],
        dims=2 * head_dim + plan.sizes[6],
    )
    return d_query[:, :, :length].swapaxes(1, 2), d_scalars


def _step_of_queries(place: Place, refs: dict[str, Any], results: Any, scratch: Any) -> None:
    """Adds one tile of keys to the gradient of its queries."""
    at = ids(3)
    flags, outer = refs["flags"][at[2]], refs["outer"][at[2]]
    d_query, d_scalars = scratch[0], results[1]

    @pl.when(flags & FIRST != 0)
    def _() -> None:
        d_query[...] = jnp.zeros_like(d_query)

    # The scalars of a row and head collect from all of its tiles: their block stays until the next head begins.
    @pl.when((flags & FIRST != 0) & (outer == 0))
    def _() -> None:
        d_scalars[...] = jnp.zeros_like(d_scalars)

    def add(tile: Tile) -> None:
        _, d_scores, pull = _of_tile(tile)
        if pull is not None:
            d_scores, each = pull(d_scores)
            _collect(d_scalars, 1, [x for entries in each for x in entries])
        key = tile.refs["key"][...]
        # Line 15: dQ += dS K.
        d_query[...] += dot(d_scores.astype(key.dtype), key, 1, 0)

    for kind in (PARTIAL, FULL):
        pl.when(flags & kind * KIND != 0)(functools.partial(add, Tile(place, refs, at, kind == PARTIAL)))

    @pl.when(flags & LAST != 0)
    def _() -> None:
        # The products were scaled: dQ is scale times the sum, and the gradient of the scale is the sum times Q.
        _collect(d_scalars, 0, [jnp.sum(d_query[...] * refs["query"][...].astype(jnp.float32))])
        results[0][...] = (d_query[...] * refs["scale"][0, 0]).astype(results[0].dtype)


def _collect(d_scalars: Any, first: int, each: list[Array]) -> None:
    """Adds a number to each lane, from the lane `first` on."""
    if not each:
        return
    lane = lax.broadcasted_iota(jnp.int32, d_scalars.shape, 1)
    total = d_scalars[...]
    for i, x in enumerate(each):
        total = total + jnp.where(lane == first + i, x, 0.0)
    d_scalars[...] = total


def _of_keys(plan: Plan, operands: Operands, d_output: Array, rows: dict[str, Array]) -> tuple[Array, Array]:
    """Returns the gradients of keys and values, `[B, S, K, H]` and `[B, S, K, V]`."""
    batch, _, num_kv_heads, _, size, head_dim, value_dim = plan.sizes
    place = Place(plan, transposed=True)
    dims, tile = (head_dim, value_dim), plan.tiles.keys
    shapes = [jax.ShapeDtypeStruct((batch, num_kv_heads, plan.padded[1], dim), plan.dtype) for dim in dims]
    results = kernel_inputs.call(
        functools.partial(_step_of_keys, place),
        _inputs(place, operands, d_output, rows),
        operands.lists(transposed=True),
        [(shape, place.by_key(dim)) for shape, dim in zip(shapes, dims, strict=True)],
        [pltpu.VMEM((tile, dim), jnp.float32) for dim in dims],
        dims=2 * (head_dim + value_dim),
    )
    d_key, d_value = (x[:, :, :size].swapaxes(1, 2) for x in results)
    return d_key, d_value


def _step_of_keys(place: Place, refs: dict[str, Any], results: Any, scratch: Any) -> None:
    """Adds one tile of queries, of one head, to the gradients of its keys and values."""
    at = ids(4)
    flags, head, group = refs["flags"][at[2]], at[3], place.plan.group
    d_key, d_value = scratch

    @pl.when((flags & FIRST != 0) & (head == 0))
    def _() -> None:
        d_key[...] = jnp.zeros_like(d_key)
        d_value[...] = jnp.zeros_like(d_value)

    def add(tile: Tile) -> None:
        weights, d_scores, pull = _of_tile(tile)
        d_scores = d_scores if pull is None else pull(d_scores)[0]
        query, d_output = tile.refs["query"][...], tile.refs["d_output"][...]
        # Lines 12 and 16, with keys as rows: dV += P^T dO, dK += dS^T Q.
        d_value[...] += dot(tile.dropped(weights).astype(d_output.dtype), d_output, 1, 0)
        d_key[...] += dot(d_scores.astype(query.dtype), query, 1, 0)

    for kind in (PARTIAL, FULL):
        pl.when(flags & kind * KIND != 0)(functools.partial(add, Tile(place, refs, at, kind == PARTIAL)))

    @pl.when((flags & LAST != 0) & (head == group - 1))
    def _() -> None:
        results[0][...] = (d_key[...] * refs["scale"][0, 0]).astype(results[0].dtype)
        results[1][...] = d_value[...].astype(results[1].dtype)


def _of_tile(tile: Tile) -> tuple[Array, Array, Any]:
    """Returns the weights of a tile, the gradient of its logits, and what pulls it back to products and scalars."""
    scores, visible, pull = tile.logits(gradients=True)
    peak, log_total, delta = (tile.vector(name, of_query=True) for name in ("peak", "log_total", "delta"))
    # P = exp(S - L), line 11. Subtracting the two parts of L one by one keeps the small part exact.
    weights = jnp.exp(scores - peak - log_total)
    if visible is not None:
        # Exact zeros: in a NaN row the exponentials of hidden pairs are NaN as well, which must reach no masked key.
        weights = jnp.where(visible, weights, 0.0)
    # dP = dO V^T, line 13. Dropout scales it by the same mask as the weights in the forward pass.
    value, d_output = tile.refs["value"][...], tile.refs["d_output"][...]
    left, right = (value, d_output) if tile.place.transposed else (d_output, value)
    d_weights = tile.dropped(dot(left, right, 1, 1))
    # The derivative of the softmax, line 14: dS = P * (dP - D).
    d_scores = weights * (d_weights - delta)
    if visible is not None:
        d_scores = jnp.where(visible, d_scores, 0.0)
    if pull is None:
        return weights, d_scores, None

    def pull_back(d_scores: Array) -> tuple[Array, Any]:
        d_products, d_scalars = pull(d_scores)
        # The modification may mask pairs, and its derivative may be NaN there.
        return jnp.where(scores == -jnp.inf, 0.0, d_products), d_scalars

    return weights, d_scores, pull_back
