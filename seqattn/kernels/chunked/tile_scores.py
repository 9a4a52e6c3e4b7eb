"""The logits of one tile (products, bias, score modification, mask), their gradients, and dropout."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from seqattn.coordinates import Coordinates
from seqattn.dropout import kept
from seqattn.kernels import blocks
from seqattn.kernels.chunked import layouts
from seqattn.kernels.chunked.layouts import At
from seqattn.kernels.chunked.operands import Operands
from seqattn.kernels.chunked.plan import Plan, TiledCall
from seqattn.kernels.chunked.schedule import Grid
from seqattn.kernels.traced import TracedMask, TracedMod


@dataclasses.dataclass(frozen=True)
class Place:
    """The location of a tile in a call.

    Attributes:
        grid: how the call is cut into tiles.
        call: the call.
        operands: the arrays that the tile is cut from.
        at: the indices of the tile: lane tile, query tile, key block.
        partial: True if a pair in the tile may be masked. A full tile evaluates no mask.
    """

    grid: Grid
    call: TiledCall
    operands: Operands
    at: At
    partial: bool

    def of_queries(self, name: str) -> Array:
        """Returns the tile of an operand indexed by queries, `[lanes, ...]`."""
        return layouts.take(self.grid, self.operands[name], self.at[1], self.at[0])

    def key_rows(self, name: str) -> Array:
        """Returns the tile of an operand with keys as rows, `[lanes, keys, D]`."""
        return layouts.take_key_rows(self.grid, self.operands[name], self.at[0], self.at[2])

    def key_columns(self, name: str) -> Array:
        """Returns the tile of an operand with keys as columns, `[lanes, D, keys]`."""
        return layouts.take_key_columns(self.grid, self.operands[name], self.at[0], self.at[2])

    def pairs(self, name: str) -> Array:
        """Returns the tile of an operand of pairs, which broadcasts to `[rows, heads, keys, group, queries]`."""
        return layouts.pairs(self.grid, self.operands[name], self.at)


@dataclasses.dataclass(frozen=True)
class TileScores:
    """The logits of a tile.

    Attributes:
        values: `[lanes, keys, columns]`; -inf for a masked pair.
        visible: boolean, of the same shape; None if all pairs are visible.
        grid: how the call is cut into tiles.
        bias: the shape of the bias in the tile, or None.
        pull_mod: pulls gradients back through the score modification; None without one, or if no gradients are needed.
    """

    values: Array
    visible: Array | None
    grid: Grid
    bias: tuple[int, ...] | None
    pull_mod: Callable[[Array], tuple[Array, list[Array], Array | None]] | None

    @staticmethod
    def of(place: Place, *, gradients: bool) -> "TileScores":
        """Computes the logits of a tile. Without `gradients` the score modification need not be differentiable."""
        grid, call = place.grid, place.call
        scores = product("lsh,lht->lst", place.key_rows("key"), place.of_queries("query"), call.high)
        # 16-bit queries are scaled here, after the product: see `inner_scale`.
        if call.inner_scale is None:
            scores = scores * call.scale
        visible: Array | None = None
        heard: Array | None = None
        if place.partial:
            real, shown = _real(place), _shown(place)
            # Padding repeats real pairs. They are hidden after the modification, which might be infinite at 0.
            visible, heard = real & shown, shown
        bias = None if call.bias is None else place.pairs("bias").astype(call.high)
        # The order of the contract: scale * q.k + bias, then the score modification, then the mask.
        if bias is not None:
            scores = (layouts.by_head(grid, scores) + bias).reshape(scores.shape)
        scores, pull_mod = _after_mod(place, scores, heard, gradients=gradients)
        if visible is not None:
            visible = jnp.broadcast_to(visible, layouts.by_head(grid, scores).shape).reshape(scores.shape)
            # -inf after the modification: whatever it made of a masked pair is discarded.
            scores = jnp.where(visible, scores, jnp.full_like(scores, -jnp.inf))
        # A modification may mask pairs of its own, so visibility is read off the final scores.
        seen = visible if call.score_mod is None else scores != -jnp.inf
        return TileScores(scores, seen, grid, None if bias is None else bias.shape, pull_mod)

    def shown(self, x: Float[Array, "lanes keys columns"]) -> Float[Array, "lanes keys columns"]:
        """Returns `x` with zeros for masked pairs."""
        return x if self.visible is None else jnp.where(self.visible, x, jnp.zeros_like(x))

    def pull_back(self, d_scores: Array) -> tuple[Array, Array | None, Array | None, list[Array]]:
        """Returns the gradients of the products, the bias, the rows and the arrays of the score modification."""
        d_rows, d_mod = None, list[Array]()
        if self.pull_mod is not None:
            hidden = self.values == -jnp.inf  # the modification may mask pairs, and its derivative may be NaN there
            d_scores, d_mod, d_rows = self.pull_mod(d_scores)
            d_scores = jnp.where(hidden, jnp.zeros_like(d_scores), d_scores)
        d_bias = None if self.bias is None else _sum_to(layouts.by_head(self.grid, d_scores), self.bias)
        return d_scores, d_bias, d_rows, d_mod


def product(subscripts: str, left: Array, right: Array, high: np.dtype) -> Array:
    """Computes a batched matrix product in the full precision of its dtype, accumulated in `high`."""
    # Products of 16-bit numbers are exact in float32. HIGHEST would keep them from the matrix units of some devices.
    small = jnp.finfo(left.dtype).bits == 16 and left.dtype == right.dtype
    precision = lax.Precision.DEFAULT if small else lax.Precision.HIGHEST
    return jnp.einsum(subscripts, left, right, precision=precision, preferred_element_type=high)


def dropped(plan: Plan, place: Place, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Applies dropout to the weights of a tile: kept ones are divided by the keep probability, the others are 0."""
    grid, call, at = place.grid, place.call, place.at
    if call.words is None or plan.dropout_rate == 0:
        return x
    # The same counters as in every kernel, row (b * N + n) * T + t and column s: lanes count b * K + k and n = k *
    # group + g, so one expression covers all batch rows and heads.
    lane = at[0] * grid.lanes + lax.iota(jnp.int32, grid.lanes)
    head = lane[:, None] * grid.group + lax.iota(jnp.int32, grid.group)[None]
    query = at[1] * grid.queries + lax.iota(jnp.int32, grid.queries)
    column = (at[2] * grid.block + lax.iota(jnp.int32, grid.keys))[None, :, None]
    if (origin := call.origin) is None:
        row = head[:, :, None] * grid.length + query[None, None]
    else:
        # A device's share counts from where it begins in the whole call.
        batch, head = lane[:, None] // grid.num_kv_heads, head % (grid.num_kv_heads * grid.group)
        head = (batch + origin.batch) * origin.num_heads + head + origin.head
        row, column = head[:, :, None] * origin.length + query[None, None] + origin.query, column + origin.key
    row = row.reshape(grid.lanes, 1, -1)
    keep = kept(call.words, plan.dropout_rate, row.astype(jnp.uint32), column.astype(jnp.uint32))
    return jnp.where(keep, x / (1 - plan.dropout_rate), jnp.zeros_like(x))


def _after_mod(
    place: Place, scores: Array, visible: Array | None, *, gradients: bool
) -> tuple[Array, Callable[[Array], tuple[Array, list[Array], Array | None]] | None]:
    """Returns the modified scores and the function that pulls gradients back.

    The score modification sees a score of 0 for a masked pair.
    """
    mod, call = place.call.score_mod, place.call
    if mod is None:
        return scores, None
    rows = None if call.rows is None else place.of_queries("rows")

    def modify(scores: Array, arrays: list[Array], rows: Array | None) -> Array:
        tile = layouts.by_head(place.grid, scores)
        shown = tile if visible is None else jnp.where(visible, tile, jnp.zeros_like(tile))
        return _modified(place, mod.with_arrays(arrays), shown, rows).reshape(scores.shape)

    pull = None
    # `jax.vjp` would differentiate the function even if only its value is needed, and it may have no derivative.
    if gradients:
        scores, pull = jax.vjp(modify, scores, mod.arrays, rows)
    else:
        scores = modify(scores, mod.arrays, rows)
    # NaN is added after the modification, and only to visible scores: it may have masked a key that is not finite.
    bad = place.key_rows("bad_keys") + place.of_queries("bad_queries")
    return jnp.where(scores == -jnp.inf, scores, scores + bad), pull


def _real(place: Place) -> Bool[Array, "..."]:
    """Returns the pairs of a tile that are no padding; broadcasts to `[rows, heads, keys, group, queries]`."""
    grid, at = place.grid, place.at
    keys = at[2] * grid.block + lax.iota(jnp.int32, grid.keys) < grid.size
    queries = at[1] * grid.queries + lax.iota(jnp.int32, grid.queries) < grid.length
    return keys[None, None, :, None, None] & queries[None, None, None, None]


def _shown(place: Place) -> Bool[Array, "..."]:
    """Returns the pairs of a tile that bias and mask show; broadcasts to `[rows, heads, keys, group, queries]`."""
    call, visible = place.call, jnp.ones((1,) * 5, bool)
    if call.bias is not None:
        visible = visible & (place.pairs("bias") != -jnp.inf)
    if isinstance(call.mask, TracedMask):
        visible = visible & _allowed(place, call.mask)
    elif call.mask is not None:
        visible = visible & place.pairs("mask")
    return visible


def _allowed(place: Place, mask: TracedMask) -> Bool[Array, "..."]:
    """Evaluates the mask over a tile: `[rows, 1 or heads, keys, 1 or group, queries]`."""

    def pair(query: Coordinates, key: Coordinates, head: Array) -> Array:
        return mask(dataclasses.replace(query, head=head), key)

    lifted = jax.vmap(pair, in_axes=(0, None, None))  # queries
    heads = _heads(place)
    # A mask that ignores the head is evaluated once and broadcast.
    heads = heads if mask.reads_head else heads[:1, :1]
    lifted = jax.vmap(lifted, in_axes=(None, None, 0))  # group
    lifted = jax.vmap(lifted, in_axes=(None, 0, None))  # keys
    lifted = jax.vmap(lifted, in_axes=(None, None, 0))  # heads
    return jax.vmap(lifted, in_axes=(0, 0, None))(*_coordinates(place), heads)


def _modified(place: Place, mod: TracedMod, scores: Float[Array, "..."], rows: Array | None) -> Float[Array, "..."]:
    """Returns the scores `[rows, heads, keys, group, queries]` of a tile after the score modification."""
    grid, (q_at, kv_at) = place.grid, _coordinates(place)
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
    return lifted(scores, q_at, kv_at, _heads(place), rows)


def _heads(place: Place) -> Int[Array, "heads group"]:
    """Returns the indices of the query heads in a tile."""
    grid, at = place.grid, place.at
    first = at[0] * grid.lanes % grid.num_kv_heads
    return (first + lax.iota(jnp.int32, grid.heads))[:, None] * grid.group + lax.iota(jnp.int32, grid.group)[None]


def _coordinates(place: Place) -> tuple[Coordinates, Coordinates]:
    """Returns the coordinates of a tile: queries `[rows, queries]` with their batch rows, and keys `[rows, keys]`."""
    grid, call, at = place.grid, place.call, place.at
    row = at[0] * grid.lanes // grid.num_kv_heads

    def take(coordinates: Coordinates, start: Array, padded: int, size: int) -> Coordinates:
        def field(x: Array) -> Array:
            shared = x.shape[0] == 1
            here = lax.dynamic_slice(
                x, (jnp.zeros_like(row) if shared else row, start), (1 if shared else grid.rows, size)
            )
            return jnp.broadcast_to(here, (grid.rows, size))

        return jax.tree.map(field, blocks.pad(coordinates, padded))

    queries, keys = grid.padded
    query = take(call.q_at, at[1] * grid.queries, queries, grid.queries)
    batch = jnp.broadcast_to((row + lax.iota(jnp.int32, grid.rows))[:, None], (grid.rows, grid.queries))
    key = take(call.kv_at, at[2] * grid.block, keys, grid.keys)
    return dataclasses.replace(query, batch=batch), key


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Returns the gradient of broadcasting from `shape`, which has the same rank."""
    return x.sum(axis=[i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1], keepdims=True).reshape(shape)
