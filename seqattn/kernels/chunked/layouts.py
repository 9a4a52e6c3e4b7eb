"""How queries, keys and pairs lie in memory for tiles: cut to a `Grid`, padded, and taken a tile at a time.

Queries `[B, T, N, D]` become `[I, L, D, C]` or `[I, L, C, D]`: I tiles of queries, L = B * K lanes, and C = group *
queries columns, the query heads of a lane side by side. Keys `[B, S, K, D]` become `[L, s, D]` or `[L, D, s]`.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from seqattn.kernels.chunked.schedule import Grid

At = Int[Array, "3"]
"""A step: the tile of lanes, the tile of queries, the block of keys."""


def _query_tiles(grid: Grid, x: Float[Array, "B T N D"], filler: float = 0.0) -> Float[Array, "B I t K G D"]:
    pad = ((0, 0), (0, grid.padded[0] - grid.length), (0, 0), (0, 0))
    padded = jnp.pad(x, pad, constant_values=filler)
    return padded.reshape(grid.batch, -1, grid.queries, grid.num_kv_heads, grid.group, x.shape[-1])


def _padded_keys(grid: Grid, x: Float[Array, "B S K D"]) -> Float[Array, "B s K D"]:
    return jnp.pad(x, ((0, 0), (0, grid.padded[1] - grid.size), (0, 0), (0, 0)))


def query_columns(grid: Grid, x: Array, scale: Array | None = None, filler: float = 0.0) -> Float[Array, "I L D C"]:
    """`[B, T, N, D]`, times the scale, with the queries of a tile as columns."""
    tiled = _query_tiles(grid, x if scale is None else x * scale, filler).transpose(1, 0, 3, 5, 4, 2)
    return tiled.reshape(tiled.shape[0], -1, x.shape[-1], grid.group * grid.queries)


def query_rows(grid: Grid, x: Array, scale: Array | None = None) -> Float[Array, "I L C D"]:
    """`[B, T, N, D]`, times the scale, with the queries of a tile as rows."""
    tiled = _query_tiles(grid, x if scale is None else x * scale).transpose(1, 0, 3, 4, 2, 5)
    return tiled.reshape(tiled.shape[0], -1, grid.group * grid.queries, x.shape[-1])


def key_rows(grid: Grid, x: Float[Array, "B S K D"]) -> Float[Array, "L s D"]:
    """`[B, S, K, D]` with keys as rows."""
    return _padded_keys(grid, x).transpose(0, 2, 1, 3).reshape(-1, grid.padded[1], x.shape[-1])


def key_columns(grid: Grid, x: Float[Array, "B S K D"]) -> Float[Array, "L D s"]:
    """`[B, S, K, D]` with keys as columns."""
    return _padded_keys(grid, x).transpose(0, 2, 3, 1).reshape(-1, x.shape[-1], grid.padded[1])


def from_columns(grid: Grid, x: Float[Array, "I L D C"]) -> Float[Array, "B T N D"]:
    """The inverse of `query_columns`."""
    tiled = x.reshape(-1, grid.batch, grid.num_kv_heads, x.shape[2], grid.group, grid.queries)
    whole = tiled.transpose(1, 0, 5, 2, 4, 3)
    return whole.reshape(grid.batch, -1, grid.num_kv_heads * grid.group, x.shape[2])[:, : grid.length]


def from_query_rows(grid: Grid, x: Float[Array, "I L C D"]) -> Float[Array, "B T N D"]:
    """The inverse of `query_rows`."""
    tiled = x.reshape(-1, grid.batch, grid.num_kv_heads, grid.group, grid.queries, x.shape[3])
    whole = tiled.transpose(1, 0, 4, 2, 3, 5)
    return whole.reshape(grid.batch, -1, grid.num_kv_heads * grid.group, x.shape[3])[:, : grid.length]


def from_key_rows(grid: Grid, x: Float[Array, "L s D"]) -> Float[Array, "B S K D"]:
    """The inverse of `key_rows`."""
    return x.reshape(grid.batch, grid.num_kv_heads, *x.shape[1:]).transpose(0, 2, 1, 3)[:, : grid.size]


def take(grid: Grid, x: Float[Array, "I L ..."], tile: Array, lanes: Array) -> Float[Array, "l ..."]:
    """The lanes and queries of a tile."""
    return lax.dynamic_slice(x, _start(tile, lanes * grid.lanes, rank=x.ndim), (1, grid.lanes, *x.shape[2:]))[0]


def put(grid: Grid, x: Float[Array, "I L ..."], new: Float[Array, "l ..."], tile: Array, lanes: Array) -> Array:
    """`x` with the lanes and queries of a tile replaced."""
    return lax.dynamic_update_slice(x, new[None], _start(tile, lanes * grid.lanes, rank=x.ndim))


def add(grid: Grid, x: Float[Array, "I L ..."], new: Float[Array, "l ..."], tile: Array, lanes: Array) -> Array:
    """`x` with something added to the lanes and queries of a tile."""
    return put(grid, x, take(grid, x, tile, lanes) + new.astype(x.dtype), tile, lanes)


def take_key_rows(grid: Grid, x: Float[Array, "L s D"], lanes: Array, block: Array) -> Float[Array, "l k D"]:
    """The lanes and keys of a tile."""
    start = _start(lanes * grid.lanes, block * grid.block, rank=3)
    return lax.dynamic_slice(x, start, (grid.lanes, grid.keys, x.shape[2]))


def take_key_columns(grid: Grid, x: Float[Array, "L D s"], lanes: Array, block: Array) -> Float[Array, "l D k"]:
    """The lanes and keys of a tile, keys as columns."""
    start = _start(lanes * grid.lanes, jnp.zeros_like(block), block * grid.block, rank=3)
    return lax.dynamic_slice(x, start, (grid.lanes, x.shape[1], grid.keys))


def add_key_rows(grid: Grid, x: Float[Array, "L s D"], new: Float[Array, "l k D"], lanes: Array, block: Array) -> Array:
    """`x` with something added to the lanes and keys of a tile."""
    start = _start(lanes * grid.lanes, block * grid.block, rank=3)
    return lax.dynamic_update_slice(x, take_key_rows(grid, x, lanes, block) + new.astype(x.dtype), start)


def _start(*index: Array, rank: int) -> list[Array]:
    """Indices of one dtype, zeros for the axes that are taken whole; under 64 bits a plain 0 would be another dtype."""
    return [*index, *[jnp.zeros_like(index[0])] * (rank - len(index))]


def by_head(grid: Grid, x: Array) -> Float[Array, "rows heads keys group queries"]:
    """A tile of scores `[lanes, keys, columns]` with an axis for each of its dims."""
    return x.reshape(grid.rows, grid.heads, x.shape[1], grid.group, grid.queries)


def _window(grid: Grid, x: Array, at: At) -> tuple[list, list[int]]:
    """Where the tile lies in pairs `[B or 1, N or 1, T or 1, S or 1]`, and its size."""
    row, head = at[0] * grid.lanes // grid.num_kv_heads, at[0] * grid.lanes % grid.num_kv_heads * grid.group
    start = (row, head, at[1] * grid.queries, at[2] * grid.block)
    size = (grid.rows, grid.heads * grid.group, grid.queries, grid.keys)
    shared = [n == 1 for n in x.shape]
    return (
        [jnp.zeros_like(n) if one else n for n, one in zip(start, shared, strict=True)],
        [1 if one else n for n, one in zip(size, shared, strict=True)],
    )


def pairs(grid: Grid, x: Array, at: At) -> Array:
    """The tile of a bias or mask, broadcasting to `[rows, heads, keys, group, queries]`."""
    tile = lax.dynamic_slice(x, *_window(grid, x, at))
    heads = (1, 1) if tile.shape[1] == 1 else (grid.heads, grid.group)
    return tile.reshape(tile.shape[0], *heads, *tile.shape[2:]).transpose(0, 1, 4, 2, 3)


def add_pairs(grid: Grid, x: Array, new: Float[Array, "rows heads keys group queries"], at: At) -> Array:
    """`x`, in the layout of a bias, with something added to the pairs of a tile."""
    start, size = _window(grid, x, at)
    tile = new.transpose(0, 1, 3, 4, 2).reshape(size)
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, start, size) + tile, start)
