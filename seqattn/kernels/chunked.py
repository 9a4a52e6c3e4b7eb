"""Attention over tiles of queries and keys: memory O(T + S), forward and backward, on any device.

An online softmax (Milakov 2018; Rabe 2021) over the tiles that the mask reaches, and the backward pass of
FlashAttention-2 (Dao 2023, algorithm 2), which computes the weights again from the log-sum-exp. The contract is that of
`reference`.

Scores are laid out `[lanes, keys, group * queries]`, keys before queries: then maxima and sums run over the slow axis,
in whole vectors, and no product needs a transposed operand (on the CPU twice as fast as queries before keys). Query
heads that share a key head lie side by side as columns, so keys are never repeated.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from seqattn.coordinates import Coordinates
from seqattn.dropout import kept
from seqattn.kernels import layouts, tiles
from seqattn.kernels.call import Call, Result, refuse_unknown
from seqattn.kernels.captured import TracedMask, TracedMod, capture
from seqattn.kernels.layouts import At
from seqattn.kernels.reference import log_sum_exp
from seqattn.kernels.tiles import Grid, Steps
from seqattn.kernels.varying import varying
from seqattn.masks import Mask
from seqattn.precision import accumulator, lowest
from seqattn.pytrees import pytree
from seqattn.score_mod import ScoreMod

_EMPTY = -1e30
"""The log of the total of an empty row. Others are about 0 at least, and nothing is lost where `lowest` is added."""


Carry = Any
"""A pytree of arrays that a loop over tiles updates in place."""


State = tuple[Array, Array, Array]
"""What a row knows of the keys that it has seen: sums of values, largest logits and totals, as tiles lie in memory."""


Leaves = list[Any]
"""The leaves of a `Call`: arrays, numbers, and NumPy arrays that are known at trace time."""


@pytree
@dataclasses.dataclass(frozen=True)
class TiledCall(Call):
    """A call whose arrays are all that a program gets: mask and score modification are traced, dropout is its words.

    Attributes:
        words: two words of the dropout's key, or None.
        schedule: the tiles to visit.
    """

    words: Any = None
    schedule: Any = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a call; `tree` is the structure of its `TiledCall`, whose leaves JAX sees."""

    grid: Grid
    dropout_rate: float
    tree: jax.tree_util.PyTreeDef

    def call(self, leaves: Leaves) -> TiledCall:
        """The call that was taken apart."""
        return jax.tree.unflatten(self.tree, leaves)


def attend(call: Call) -> Result:
    """The output and the log-sum-exp of the logits, as `reference.attend`.

    Reverse mode only: forward-mode and second derivatives are refused; `implementation="reference"` has them. Forward
    mode of a call that an outer `jax.jit` has traced meets JAX's own TypeError ("can't apply forward-mode autodiff"),
    as JAX differentiates that program when this function has long returned.
    """
    refuse_unknown("a grid of tiles", call.query.shape, call.key.shape)
    if call.value.shape[-1] == 0:
        raise NotImplementedError("a value dim of 0 leaves nothing to add up in tiles")
    if call.is_empty:
        return call.nothing()
    plan, leaves = prepare(call)
    try:
        return _attend(plan, varying(leaves, leaves))
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise NotImplementedError("forward-mode derivatives of attention are only known to 'reference'") from error


def prepare(call: Call) -> tuple[Plan, Leaves]:
    """A call of `attend` with its grid and schedule, taken apart."""
    batch, length, num_heads, _ = call.query.shape
    size, num_kv_heads = call.key.shape[1:3]
    shape = (batch, num_kv_heads, num_heads // num_kv_heads, length, size)
    grid, schedule = tiles.plan(shape, call.mask, call.bias is not None, call.q_at, call.kv_at)
    words = None if call.dropout is None else call.dropout.words()
    given = {field.name: getattr(call, field.name) for field in dataclasses.fields(Call)}
    given |= {"scale": jnp.asarray(call.scale, call.high), "dropout": None}
    tiled = TiledCall(**given, words=words, schedule=schedule)
    leaves, tree = jax.tree.flatten(capture(tiled, like=tiled))
    return Plan(grid, 0.0 if call.dropout is None else call.dropout.rate, tree), leaves


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, leaves: Leaves) -> tuple[Array, Array]:
    output, peak, log_total = _results(plan, leaves)
    return output, lse_of(peak, log_total)


def _forward(plan: Plan, leaves: Leaves) -> tuple[tuple[Array, Array], tuple]:
    output, peak, log_total = _results(plan, leaves)
    return (output, lse_of(peak, log_total)), (leaves, output, peak, log_total)


def _backward(plan: Plan, residuals: tuple, directions: tuple) -> tuple[list[Array | np.ndarray]]:
    leaves, *results = residuals
    gradients = iter(_gradients(plan, leaves, *results, *directions))
    return ([next(gradients) if is_floating(x) else np.zeros(jnp.shape(x), jax.dtypes.float0) for x in leaves],)


@functools.partial(jax.jit, static_argnums=0)
def _results(plan: Plan, leaves: Leaves) -> tuple[Array, Array, Array]:
    return finish(plan, leaves, absorb(plan, leaves, start(plan, leaves)))


def start(plan: Plan, leaves: Leaves) -> State:
    """The state of the queries of a call before they have seen a key."""
    call, grid = plan.call(leaves), plan.grid
    high = call.high
    shape = (grid.counts[1], grid.batch * grid.num_kv_heads)
    columns = grid.group * grid.queries
    return (
        jnp.zeros((*shape, call.value.shape[-1], columns), high),
        jnp.full((*shape, columns), lowest(high), high),
        jnp.zeros((*shape, columns), high),
    )


def absorb(plan: Plan, leaves: Leaves, state: State) -> State:
    """The state after the keys of a call, too: of those before, other calls of one grid and the same queries tell."""
    call = plan.call(leaves)
    grid, high = plan.grid, call.high
    key, value = _marked(call.key, call.value)
    operands = {
        "query": layouts.query_columns(grid, call.query, _inner_scale(call)),
        "key": layouts.key_rows(grid, key),
        "value": layouts.key_columns(grid, value),
    } | _operands(grid, call, key)

    def step(carry: Carry, at: At, partial: bool) -> Carry:
        output, peak, total = (layouts.take(grid, x, at[1], at[0]) for x in carry)
        scores, *_ = _scores(plan, call, operands, at, partial, gradients=False)
        top = jnp.maximum(peak, scores.max(axis=1))
        # Without the barrier the exponentials would be computed twice, for their sum and for the product.
        weights = lax.optimization_barrier(jnp.exp(scores - top[:, None]))
        shrink = jnp.exp(peak - top)
        total = total * shrink + weights.sum(axis=1)
        weights = _dropped(plan, call, weights, at).astype(value.dtype)
        values = layouts.take_key_columns(grid, operands["value"], at[0], at[2])
        output = output * shrink[:, None] + _product("lvs,lst->lvt", values, weights, high)
        return tuple(
            layouts.put(grid, x, new, at[1], at[0]) for x, new in zip(carry, (output, top, total), strict=True)
        )

    return _visit(call, step, state)


def finish(plan: Plan, leaves: Leaves, state: State) -> tuple[Array, Array, Array]:
    """The output, the largest logit of each row, and the log of the sum of `exp(logit - largest)`.

    The two parts of the log-sum-exp stay apart: their sum would round the small one away where logits are huge. The
    largest logit of an empty row is `lowest`, and its log is `_EMPTY`, as that of no other row.
    """
    call, grid = plan.call(leaves), plan.grid
    output, peak, total = state
    empty = total == 0
    total = jnp.where(empty, jnp.ones_like(total), total)
    log_total = jnp.where(empty, _EMPTY, jnp.log(total))
    output = layouts.from_columns(grid, output / total[:, :, None]).astype(call.query.dtype)
    peak, log_total = (layouts.from_columns(grid, x[:, :, None])[..., 0] for x in (peak, log_total))
    return output, peak, log_total


def lse_of(peak: Array, log_total: Array) -> Array:
    """The log-sum-exp of what `finish` gives."""
    return log_sum_exp(peak + log_total, log_total == _EMPTY)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    plan: Plan, leaves: Leaves, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> list[Array]:
    """The gradients by all floating leaves of the call."""
    call = plan.call(leaves)
    gradients = backward(plan, leaves, output, peak, log_total, d_output, d_lse)
    everything = jax.tree.leaves(with_gradients(call, gradients))
    return [d.astype(x.dtype) for d, x in zip(everything, leaves, strict=True) if is_floating(x)]


def with_gradients(call: Any, gradients: dict[str, Any]) -> Any:
    """A call with what `backward` returns in the place of its arrays, and zeros elsewhere."""
    zeros = jax.tree.map(jnp.zeros_like, call)
    mod = None if zeros.score_mod is None else zeros.score_mod.with_arrays(gradients["score_mod"])
    return dataclasses.replace(zeros, **gradients | {"score_mod": mod})


def backward(
    plan: Plan, leaves: Leaves, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> dict[str, Any]:
    """The gradients by what is floating in a `Call`, by its name and in float32 at least; of the score_mod, a list.

    What `finish` gave may count the keys of other calls, too: then these are the parts due to this one.
    """
    call = plan.call(leaves)
    grid, high = plan.grid, accumulator(output.dtype)
    operands = _operands_of_backward(grid, call, output, peak, log_total, d_output, d_lse)
    by_query = {
        "query": jnp.zeros(operands["query"].shape, high),
        "rows": None if call.rows is None else jnp.zeros(operands["rows"].shape, high),
    }
    by_key = {name: jnp.zeros(operands[name].shape, high) for name in ("key", "value")}
    by_pair = None if call.bias is None else jnp.zeros(operands["bias"].shape, high)
    whole = [jnp.zeros(x.shape, high) for x in arrays_of(call.score_mod)]

    def step(carry: Carry, at: At, partial: bool) -> Carry:
        by_query, by_key, by_pair, whole = carry
        lanes, i, block = at
        d = _tile_gradients(plan, call, operands, at, partial)
        by_query = {
            "query": layouts.add(grid, by_query["query"], d["query"], i, lanes),
            "rows": None if d["rows"] is None else layouts.add(grid, by_query["rows"], d["rows"], i, lanes),
        }
        by_key = {name: layouts.add_key_rows(grid, by_key[name], d[name], lanes, block) for name in ("key", "value")}
        by_pair = None if d["bias"] is None else layouts.add_pairs(grid, by_pair, d["bias"], at)
        return by_query, by_key, by_pair, [a + b.astype(a.dtype) for a, b in zip(whole, d["score_mod"], strict=True)]

    by_query, by_key, by_pair, whole = _visit(call, step, (by_query, by_key, by_pair, whole))
    unscaled = layouts.from_columns(grid, by_query["query"])
    outer = call.scale if _inner_scale(call) is None else 1
    return {
        "query": unscaled * call.scale,
        "key": layouts.from_key_rows(grid, by_key["key"]) * outer,
        "value": layouts.from_key_rows(grid, by_key["value"]),
        "scale": jnp.sum(unscaled * _zero_unless_finite(call.query).astype(high)),
        "bias": None if call.bias is None else by_pair[:, :, : call.bias.shape[2], : call.bias.shape[3]],
        "rows": None if by_query["rows"] is None else layouts.from_query_rows(grid, by_query["rows"]),
        "score_mod": whole,
    }


def _operands_of_backward(
    grid: Grid, call: TiledCall, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> dict[str, Array]:
    """What tiles of the backward pass are cut from: queries, keys, values and what `finish` and the caller gave."""
    high = accumulator(output.dtype)
    key, value = _marked(call.key, call.value)
    delta = jnp.sum(d_output.astype(high) * output.astype(high), axis=-1) - d_lse
    return {
        "query": layouts.query_columns(grid, call.query, _inner_scale(call)),
        "query_rows": layouts.query_rows(grid, _zero_unless_finite(call.query), _inner_scale(call)),
        "key": layouts.key_rows(grid, key),
        "key_columns": layouts.key_columns(grid, _zero_unless_finite(key)),
        "value": layouts.key_rows(grid, value),
        "d_output": layouts.query_columns(grid, d_output),
        "d_output_rows": layouts.query_rows(grid, d_output),
        "delta": layouts.query_columns(grid, delta[..., None])[:, :, 0],
        "peak": layouts.query_columns(grid, peak[..., None], filler=jnp.inf)[:, :, 0],
        "log_total": layouts.query_columns(grid, log_total[..., None])[:, :, 0],
    } | _operands(grid, call, key)


def _tile_gradients(plan: Plan, call: TiledCall, operands: dict[str, Array], at: At, partial: bool) -> dict[str, Any]:
    """What the pairs of a tile add to the gradients, by the names of `backward`; of the query before the scale."""
    grid, dtype, high = plan.grid, call.query.dtype, call.high
    lanes, i, block = at
    here = {name: layouts.take(grid, operands[name], i, lanes) for name in _OF_QUERIES}
    value = layouts.take_key_rows(grid, operands["value"], lanes, block)
    key = layouts.take_key_columns(grid, operands["key_columns"], lanes, block)
    scores, pull_back, visible = _scores(plan, call, operands, at, partial, gradients=True)
    weights = jnp.exp(scores - here["peak"][:, None] - here["log_total"][:, None])
    weights = lax.optimization_barrier(_where(visible, weights))
    d_weights = _product("lsv,lvt->lst", value, here["d_output"], high)
    d_weights = _dropped(plan, call, d_weights, at)
    d_scores = _where(visible, weights * (d_weights - here["delta"][:, None]))
    d_products, d_bias, d_rows, d_mod = pull_back(d_scores)
    d_products = lax.optimization_barrier(d_products.astype(dtype))
    weights = _dropped(plan, call, weights, at).astype(dtype)
    return {
        "query": _product("lhs,lst->lht", key, d_products, high),
        "key": _product("lst,lth->lsh", d_products, here["query_rows"], high),
        "value": _product("lst,ltv->lsv", weights, here["d_output_rows"], high),
        "bias": d_bias,
        "rows": d_rows,
        "score_mod": d_mod,
    }


def _refuse_second(plan: Plan, *residuals: Any) -> Any:
    raise NotImplementedError("second derivatives of attention are only known to 'reference'")


_attend.defvjp(_forward, _backward)
_gradients.defvjp(_refuse_second, _refuse_second)


_OF_QUERIES = ("query_rows", "d_output", "d_output_rows", "delta", "peak", "log_total")


def _visit(call: TiledCall, step: Callable[..., Carry], carry: Carry) -> Carry:
    carry, schedule = varying(carry, call), call.schedule
    for steps, partial in ((schedule.full, False), (schedule.partial, True)):
        number = steps.at.shape[0]
        if number == 1 and steps.count is None:
            carry = step(carry, jnp.asarray(steps.at[0]), partial)
        elif number:
            carry = _loop(steps, functools.partial(step, partial=partial), carry)
    return carry


def _loop(steps: Steps, step: Callable[[Carry, Array], Carry], carry: Carry) -> Carry:
    count = steps.at.shape[0] if steps.count is None else steps.count
    return lax.fori_loop(0, count, lambda n, carry: step(carry, jnp.asarray(steps.at)[n]), carry)


def _scores(
    plan: Plan, call: TiledCall, operands: dict[str, Array], at: At, partial: bool, *, gradients: bool
) -> tuple[Array, Callable[[Array], tuple], Array | None]:
    """The logits of a tile `[lanes, keys, columns]`, how gradients go back, and who may attend (None: all).

    Without `gradients` none goes back: a score_mod need not have a derivative where nobody asks for it.
    """
    grid, high = plan.grid, call.high
    lanes, i, block = at
    key, query = (
        layouts.take_key_rows(grid, operands["key"], lanes, block),
        layouts.take(grid, operands["query"], i, lanes),
    )
    scores = _product("lsh,lht->lst", key, query, high)
    if _inner_scale(call) is None:
        scores = scores * call.scale
    visible = _visible(grid, call, operands, at) if partial else None
    bias = None if call.bias is None else layouts.pairs(grid, operands["bias"], at).astype(high)
    if bias is not None:
        scores = (layouts.by_head(grid, scores) + bias).reshape(scores.shape)

    def modify(scores: Array, mod: TracedMod, rows: Array | None) -> Array:
        tile = layouts.by_head(grid, scores)
        shown = tile if visible is None else jnp.where(visible, tile, jnp.zeros_like(tile))
        return _modified(grid, call, mod, shown, rows, at).reshape(scores.shape)

    mod, pull_mod = call.score_mod, None
    if mod is not None:
        rows = None if call.rows is None else layouts.take(grid, operands["rows"], i, lanes)
        if gradients:
            scores, pull_mod = jax.vjp(
                lambda scores, arrays, rows: modify(scores, mod.with_arrays(arrays), rows), scores, mod.arrays, rows
            )
        else:
            scores = modify(scores, mod, rows)
        bad = layouts.take_key_rows(grid, operands["bad_keys"], lanes, block)
        bad = bad + layouts.take(grid, operands["bad_queries"], i, lanes)
        scores = jnp.where(scores == -jnp.inf, scores, scores + bad)

    def pull_back(d_scores: Array) -> tuple[Array, Array | None, Array | None, list[Array]]:
        d_rows, d_mod = None, []
        if pull_mod is not None:
            hidden = scores == -jnp.inf  # also by the mod itself, whose derivative may be NaN there
            d_scores, d_mod, d_rows = pull_mod(d_scores)
            d_scores = jnp.where(hidden, jnp.zeros_like(d_scores), d_scores)
        d_bias = None if bias is None else _sum_to(layouts.by_head(grid, d_scores), bias.shape)
        return d_scores, d_bias, d_rows, d_mod

    if visible is not None:
        tile = layouts.by_head(grid, scores)
        visible = jnp.broadcast_to(visible, tile.shape).reshape(scores.shape)
        scores = jnp.where(visible, scores, jnp.full_like(scores, -jnp.inf))
    return scores, pull_back, visible if call.score_mod is None else scores != -jnp.inf


def _visible(grid: Grid, call: TiledCall, operands: dict[str, Array], at: At) -> Bool[Array, "..."]:
    """Who may attend in a tile: broadcasts to `[rows, heads, keys, group, queries]`."""
    # A query that pads sees nothing either: what a score_mod has for a derivative there may be infinite.
    visible = (at[2] * grid.block + lax.iota(jnp.int32, grid.keys) < grid.size)[None, None, :, None, None]
    if grid.padded[0] != grid.length:
        real = at[1] * grid.queries + lax.iota(jnp.int32, grid.queries) < grid.length
        visible = visible & real[None, None, None, None]
    if call.bias is not None:
        visible = visible & (layouts.pairs(grid, operands["bias"], at) != -jnp.inf)
    if isinstance(call.mask, TracedMask):
        visible = visible & _allowed(grid, call, call.mask, at)
    elif call.mask is not None:
        visible = visible & layouts.pairs(grid, operands["mask"], at)
    return visible


def _allowed(grid: Grid, call: TiledCall, mask: TracedMask, at: At) -> Bool[Array, "..."]:
    """What the mask says of a tile: `[rows, 1 or heads, keys, 1 or group, queries]`."""

    def pair(query: Coordinates, key: Coordinates, head: Array) -> Array:
        return mask(dataclasses.replace(query, head=head), key)

    lifted = jax.vmap(pair, in_axes=(0, None, None))  # queries
    heads = _heads(grid, at)
    heads = heads if mask.reads_head else heads[:1, :1]
    lifted = jax.vmap(lifted, in_axes=(None, None, 0))  # group
    lifted = jax.vmap(lifted, in_axes=(None, 0, None))  # keys
    lifted = jax.vmap(lifted, in_axes=(None, None, 0))  # heads
    return jax.vmap(lifted, in_axes=(0, 0, None))(*_coordinates(grid, call, at), heads)


def _modified(
    grid: Grid, call: TiledCall, mod: ScoreMod, scores: Float[Array, "..."], rows: Array | None, at: At
) -> Float[Array, "..."]:
    """The scores `[rows, heads, keys, group, queries]` of a tile after the score modification."""
    q_at, kv_at = _coordinates(grid, call, at)
    if rows is not None:
        rows = rows.reshape(grid.rows, grid.heads, grid.group, grid.queries, rows.shape[-1])

    def pair(score: Array, query: Coordinates, key: Coordinates, head: Array, row: Array | None) -> Array:
        return mod(score, dataclasses.replace(query, head=head), key, head, row)

    axis = None if rows is None else 0
    lifted = jax.vmap(pair, in_axes=(0, 0, None, None, axis))  # queries
    lifted = jax.vmap(lifted, in_axes=(0, None, None, 0, axis))  # group
    lifted = jax.vmap(lifted, in_axes=(0, None, 0, None, None))  # keys
    lifted = jax.vmap(lifted, in_axes=(0, None, None, 0, axis))  # heads
    lifted = jax.vmap(lifted, in_axes=(0, 0, 0, None, axis))  # rows
    return lifted(scores, q_at, kv_at, _heads(grid, at), rows)


def _heads(grid: Grid, at: At) -> Int[Array, "heads group"]:
    """The indices of the query heads in a tile."""
    first = at[0] * grid.lanes % grid.num_kv_heads
    return (first + lax.iota(jnp.int32, grid.heads))[:, None] * grid.group + lax.iota(jnp.int32, grid.group)[None]


def _coordinates(grid: Grid, call: TiledCall, at: At) -> tuple[Coordinates, Coordinates]:
    """Of the queries and of the keys in a tile: `[rows, queries]`, with their batch rows, and `[rows, keys]`."""
    row = at[0] * grid.lanes // grid.num_kv_heads

    def take(coordinates: Coordinates, start: Array, padded: int, size: int) -> Coordinates:
        def field(x: Array) -> Array:
            shared = x.shape[0] == 1
            here = lax.dynamic_slice(
                x, (jnp.zeros_like(row) if shared else row, start), (1 if shared else grid.rows, size)
            )
            return jnp.broadcast_to(here, (grid.rows, size))

        return jax.tree.map(field, tiles.pad(coordinates, padded))

    queries, keys = grid.padded
    query = take(call.q_at, at[1] * grid.queries, queries, grid.queries)
    batch = jnp.broadcast_to((row + lax.iota(jnp.int32, grid.rows))[:, None], (grid.rows, grid.queries))
    key = take(call.kv_at, at[2] * grid.block, keys, grid.keys)
    return dataclasses.replace(query, batch=batch), key


def _dropped(plan: Plan, call: TiledCall, x: Float[Array, "..."], at: At) -> Float[Array, "..."]:
    """`x` of a tile where its weight is kept, divided by the probability of that; 0 elsewhere."""
    if call.words is None or plan.dropout_rate == 0:
        return x
    grid = plan.grid
    lane = at[0] * grid.lanes + lax.iota(jnp.int32, grid.lanes)
    head = lane[:, None] * grid.group + lax.iota(jnp.int32, grid.group)[None]
    query = at[1] * grid.queries + lax.iota(jnp.int32, grid.queries)
    row = (head[:, :, None] * grid.length + query[None, None]).reshape(grid.lanes, 1, -1)
    column = (at[2] * grid.block + lax.iota(jnp.int32, grid.keys))[None, :, None]
    keep = kept(call.words, plan.dropout_rate, row.astype(jnp.uint32), column.astype(jnp.uint32))
    return jnp.where(keep, x / (1 - plan.dropout_rate), jnp.zeros_like(x))


def _product(subscripts: str, left: Array, right: Array, high: np.dtype) -> Array:
    """A batched matrix product in the full precision of its dtype, summed in `high`."""
    return jnp.einsum(subscripts, left, right, precision=lax.Precision.HIGHEST, preferred_element_type=high)


def _inner_scale(call: TiledCall) -> Array | None:
    """The scale where it can multiply the queries; None where they are too coarse and it multiplies the products."""
    return call.scale if call.query.dtype == call.high else None


def _marked(key: Float[Array, "B S K H"], value: Float[Array, "B S K V"]) -> tuple[Array, Array]:
    """Keys that are NaN wherever key or value are not finite, and values that are 0 there.

    A product with a key gives scores of that key alone, which the mask can hide; one with a value reaches every row.
    """
    bad = _nan_unless_finite(key) + _nan_unless_finite(value)
    return key + bad, jnp.where(jnp.isnan(bad), jnp.zeros_like(value), value)


def _nan_unless_finite(x: Float[Array, "*shape D"]) -> Float[Array, "*shape 1"]:
    """0, or NaN for a vector that is not finite; on the CPU three times as fast as `isfinite(x).all(axis=-1)`."""
    return jnp.sum(x * jnp.zeros((), x.dtype), axis=-1, keepdims=True)


def _zero_unless_finite(x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
    """`x` with zeros in the vectors that are not finite."""
    return jnp.where(jnp.isnan(_nan_unless_finite(x)), jnp.zeros_like(x), x)


def _where(visible: Bool[Array, "..."] | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x if visible is None else jnp.where(visible, x, jnp.zeros_like(x))


def _operands(grid: Grid, call: TiledCall, key: Float[Array, "B S K H"]) -> dict[str, Array]:
    """What belongs to each query or to each pair, padded to whole tiles; `key` is NaN where it must make a row NaN.

    A score_mod may hide a pair, too, so it works on finite scores and what is not finite is marked after it.
    """
    given: dict[str, Array] = {}
    if call.score_mod is not None:
        high, query, rows = call.high, call.query, call.rows
        bad = _nan_unless_finite(query) if rows is None else _nan_unless_finite(query) + _nan_unless_finite(rows)
        given["bad_queries"] = layouts.query_columns(grid, bad.astype(high))
        given["bad_keys"] = layouts.key_rows(grid, _nan_unless_finite(key).astype(high))
        given["query"] = layouts.query_columns(grid, _zero_unless_finite(query), _inner_scale(call))
        given["key"] = layouts.key_rows(grid, _zero_unless_finite(key))
        if rows is not None:
            given["rows"] = layouts.query_rows(grid, _zero_unless_finite(rows))
    # What pads hides: a query that does not exist sees no key that all others must not see.
    for name, x, hidden in (("bias", call.bias, -jnp.inf), ("mask", call.mask, False)):
        if x is not None and not isinstance(x, Mask):
            behind = (0 if n == 1 else whole - n for n, whole in zip(x.shape[2:], grid.padded, strict=True))
            given[name] = jnp.pad(x, ((0, 0), (0, 0), *((0, n) for n in behind)), constant_values=hidden)
    return given


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of broadcasting from `shape`, of the same rank."""
    return x.sum(axis=[i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1], keepdims=True).reshape(shape)


def arrays_of(mod: TracedMod | None) -> list[Array]:
    """The arrays of a score modification that have gradients."""
    return [] if mod is None else mod.arrays


def is_floating(x: Any) -> bool:
    """Whether a leaf has a gradient."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
