"""Memory layouts of queries, keys and pairs for tiles: arrays are padded to a `Grid` and read one tile at a time.

Queries `[B, T, N, D]` become `[I, L, D, C]` or `[I, L, C, D]`, with I query tiles, L = B * K lanes and C = group *
queries columns: the query heads of a lane are adjacent. Keys `[B, S, K, D]` become `[L, s, D]` or `[L, D, s]`.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from seqattn.kernels.chunked.schedule import Grid

At = Int[Array, "3"]
"""A step: the indices of the lane tile, the query tile and the key block."""


REPEAT = None
"""The filler that repeats the last query or key."""


def _pad(x: Float[Array, "B L N D"], length: int, filler: float | None) -> Float[Array, "B l N D"]:
    """Returns `x` padded to a length."""
    behind = ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))
    return jnp.pad(x, behind, mode="edge") if filler is REPEAT else jnp.pad(x, behind, constant_values=filler)


def _query_tiles(grid: Grid, x: Float[Array, "B T N D"], filler: float | None) -> Float[Array, "B I t K G D"]:
    """Returns `[B, T, N, D]` padded to whole tiles and split into tiles and key heads."""
    padded = _pad(x, grid.padded[0], filler)
    # N splits into (K, group): query heads n = k * group + g read key head k (Ainslie 2023), without a copy of the
    # keys.
    return padded.reshape(grid.batch, -1, grid.queries, grid.num_kv_heads, grid.group, x.shape[-1])


def query_columns(
    grid: Grid, x: Array, scale: Array | None = None, filler: float | None = 0.0
) -> Float[Array, "I L D C"]:
    """Returns `[B, T, N, D]`, multiplied by `scale` if given, with the queries of a tile as columns."""
    # Scaling T * H numbers here replaces scaling T * S scores. Columns are the right operand of key @ query: no product
    # needs a transposed operand.
    tiled = _query_tiles(grid, x if scale is None else x * scale, filler).transpose(1, 0, 3, 5, 4, 2)
    return tiled.reshape(tiled.shape[0], -1, x.shape[-1], grid.group * grid.queries)


def query_rows(grid: Grid, x: Array, scale: Array | None = None, filler: float | None = 0.0) -> Float[Array, "I L C D"]:
    """Returns `[B, T, N, D]`, multiplied by `scale` if given, with the queries of a tile as rows."""
    # The backward pass also multiplies by the transposed query. Storing both layouts once is cheaper than transposing
    # in each step.
    tiled = _query_tiles(grid, x if scale is None else x * scale, filler).transpose(1, 0, 3, 4, 2, 5)
    return tiled.reshape(tiled.shape[0], -1, grid.group * grid.queries, x.shape[-1])


def key_rows(grid: Grid, x: Float[Array, "B S K D"], filler: float | None = 0.0) -> Float[Array, "L s D"]:
    """Returns `[B, S, K, D]` with keys as rows."""
    # A tile may start at every block, so the last one may reach past the end: a slice of that would be shifted.
    return _pad(x, grid.padded[1], filler).transpose(0, 2, 1, 3).reshape(-1, grid.padded[1], x.shape[-1])


def key_columns(grid: Grid, x: Float[Array, "B S K D"]) -> Float[Array, "L D s"]:
    """Returns `[B, S, K, D]` with keys as columns."""
    return _pad(x, grid.padded[1], 0.0).transpose(0, 2, 3, 1).reshape(-1, x.shape[-1], grid.padded[1])


def from_columns(grid: Grid, x: Float[Array, "I L D C"]) -> Float[Array, "B T N D"]:
    """Inverts `query_columns`."""
    tiled = x.reshape(-1, grid.batch, grid.num_kv_heads, x.shape[2], grid.group, grid.queries)
    whole = tiled.transpose(1, 0, 5, 2, 4, 3)
    # Padding queries are cut off here; their outputs are zeros.
    return whole.reshape(grid.batch, -1, grid.num_kv_heads * grid.group, x.shape[2])[:, : grid.length]


def from_query_rows(grid: Grid, x: Float[Array, "I L C D"]) -> Float[Array, "B T N D"]:
    """Inverts `query_rows`."""
    tiled = x.reshape(-1, grid.batch, grid.num_kv_heads, grid.group, grid.queries, x.shape[3])
    whole = tiled.transpose(1, 0, 4, 2, 3, 5)
    return whole.reshape(grid.batch, -1, grid.num_kv_heads * grid.group, x.shape[3])[:, : grid.length]


def from_key_rows(grid: Grid, x: Float[Array, "L s D"]) -> Float[Array, "B S K D"]:
    """Inverts `key_rows`."""
    return x.reshape(grid.batch, grid.num_kv_heads, *x.shape[1:]).transpose(0, 2, 1, 3)[:, : grid.size]


def take(grid: Grid, x: Float[Array, "I L ..."], tile: Array, lanes: Array) -> Float[Array, "l ..."]:
    """Returns the lanes and queries of one tile."""
    # A dynamic slice with a static size compiles once for all steps of the loop.
    return lax.dynamic_slice(x, _start(tile, lanes * grid.lanes, rank=x.ndim), (1, grid.lanes, *x.shape[2:]))[0]


def put(grid: Grid, x: Float[Array, "I L ..."], new: Float[Array, "l ..."], tile: Array, lanes: Array) -> Array:
    """Returns `x` with the lanes and queries of one tile replaced."""
    # In a loop carry, XLA performs this update in place.
    return lax.dynamic_update_slice(x, new[None], _start(tile, lanes * grid.lanes, rank=x.ndim))


def add(grid: Grid, x: Float[Array, "I L ..."], new: Float[Array, "l ..."], tile: Array, lanes: Array) -> Array:
    """Returns `x` with `new` added to the lanes and queries of one tile."""
    return put(grid, x, take(grid, x, tile, lanes) + new.astype(x.dtype), tile, lanes)


def take_key_rows(grid: Grid, x: Float[Array, "L s D"], lanes: Array, block: Array) -> Float[Array, "l k D"]:
    """Returns the lanes and keys of one tile, keys as rows."""
    # Tiles start at any block, so the offset counts blocks and the size counts a whole tile of keys.
    start = _start(lanes * grid.lanes, block * grid.block, rank=3)
    return lax.dynamic_slice(x, start, (grid.lanes, grid.keys, x.shape[2]))


def take_key_columns(grid: Grid, x: Float[Array, "L D s"], lanes: Array, block: Array) -> Float[Array, "l D k"]:
    """Returns the lanes and keys of one tile, keys as columns."""
    start = _start(lanes * grid.lanes, jnp.zeros_like(block), block * grid.block, rank=3)
    return lax.dynamic_slice(x, start, (grid.lanes, x.shape[1], grid.keys))


def add_key_rows(grid: Grid, x: Float[Array, "L s D"], new: Float[Array, "l k D"], lanes: Array, block: Array) -> Array:
    """Returns `x` with `new` added to the lanes and keys of one tile."""
    # Tiles of keys may overlap between query tiles, so gradients are added and never stored over each other.
    start = _start(lanes * grid.lanes, block * grid.block, rank=3)
    return lax.dynamic_update_slice(x, take_key_rows(grid, x, lanes, block) + new.astype(x.dtype), start)


def _start(*index: Array, rank: int) -> list[Array]:
    """Returns start indices of one dtype, with zeros for the remaining axes.

    With 64-bit types enabled a plain 0 would have another dtype than the indices, which `lax.dynamic_slice` refuses.
    """
    return [*index, *[jnp.zeros_like(index[0])] * (rank - len(index))]


def by_head(grid: Grid, x: Array) -> Float[Array, "rows heads keys group queries"]:
    """Returns a tile of scores `[lanes, keys, columns]` with a separate axis for each of its dims."""
    return x.reshape(grid.rows, grid.heads, x.shape[1], grid.group, grid.queries)


def _window(grid: Grid, x: Array, at: At) -> tuple[list, list[int]]:
    """Returns the start and the size of a tile in pairs `[B or 1, N or 1, T or 1, S or 1]`."""
    # Lanes count row-major over (B, K), so the first lane of the tile gives its first row and key head.
    row, head = at[0] * grid.lanes // grid.num_kv_heads, at[0] * grid.lanes % grid.num_kv_heads * grid.group
    start = (row, head, at[1] * grid.queries, at[2] * grid.block)
    size = (grid.rows, grid.heads * grid.group, grid.queries, grid.keys)
    # A dim of size 1 is broadcast: each tile reads it from index 0, and its gradients are summed there.
    shared = [n == 1 for n in x.shape]
    return (
        [jnp.zeros_like(n) if one else n for n, one in zip(start, shared, strict=True)],
        [1 if one else n for n, one in zip(size, shared, strict=True)],
    )


def pairs(grid: Grid, x: Array, at: At) -> Array:
    """Returns a tile of a bias or mask that broadcasts to `[rows, heads, keys, group, queries]`."""
    tile = lax.dynamic_slice(x, *_window(grid, x, at))
    # The head axis splits as in `_query_tiles`, and keys move in front of the queries, as in the scores.
    heads = (1, 1) if tile.shape[1] == 1 else (grid.heads, grid.group)
    return tile.reshape(tile.shape[0], *heads, *tile.shape[2:]).transpose(0, 1, 4, 2, 3)


def add_pairs(grid: Grid, x: Array, new: Float[Array, "rows heads keys group queries"], at: At) -> Array:
    """Returns `x`, in the layout of a bias, with `new` added to the pairs of one tile."""
    start, size = _window(grid, x, at)
    tile = new.transpose(0, 1, 3, 4, 2).reshape(size)
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, start, size) + tile, start)
