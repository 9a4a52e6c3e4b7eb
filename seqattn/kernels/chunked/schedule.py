"""The grid of tiles over queries and keys, and which of its tiles have anything to compute."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from seqattn.coordinates import Coordinates, Tile
from seqattn.mask import Mask, Reach, Truth
from seqattn.pytrees import pytree

_VECTOR, _BLOCK = 16, 32
_QUERIES, _KEYS, _LANES = (256, 512), 512, 4
"""On the CPU a product of fewer than 256 * 512 scores runs on one thread, and four of them stay near the cores."""
_AT_ONCE = 2**21
"""So many scores are computed in one step: short texts need no loop."""
_STEP = 32_000
"""What a step costs beside its scores, in scores."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """How one call is cut. A lane is one key head of one batch row; a tile is a few lanes, queries and keys.

    Tiles of keys begin at any block, so that they follow the edge of a window or of a text.

    Attributes:
        batch, num_kv_heads, group, length, size: B, K, N / K, T and S of the call.
        lanes: lanes in a tile; it divides K, or it is a multiple of K that divides B * K.
        queries: queries in a tile, for each of the `group` query heads of a lane.
        block: keys in a block.
        keys: keys in a tile, a multiple of `block`.
    """

    batch: int
    num_kv_heads: int
    group: int
    length: int
    size: int
    lanes: int
    queries: int
    block: int
    keys: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many tiles of lanes, tiles of queries and blocks of keys there are."""
        lanes = self.batch * self.num_kv_heads
        return lanes // self.lanes, -(-self.length // self.queries), -(-self.size // self.block)

    @property
    def padded(self) -> tuple[int, int]:
        """T rounded up to whole tiles, and S such that a tile may begin at every block."""
        _, tiles, blocks = self.counts
        return tiles * self.queries, (blocks - 1) * self.block + self.keys

    @property
    def rows(self) -> int:
        """Batch rows in a tile."""
        return max(1, self.lanes // self.num_kv_heads)

    @property
    def heads(self) -> int:
        """Key heads in a tile."""
        return min(self.num_kv_heads, self.lanes)


@pytree
@dataclasses.dataclass(frozen=True)
class Steps:
    """Tiles to visit, in order: the first `count` rows of `at`, each (tile of lanes, tile of queries, block of keys).

    `count` is None where it was known at trace time: then every row of `at` is visited.
    """

    at: np.ndarray | Array
    count: Array | None


@pytree
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The tiles in which some pair may attend: `partial` ones evaluate the mask for each pair, `full` ones do not."""

    partial: Steps
    full: Steps


def plan(
    shape: tuple[int, int, int, int, int],
    mask: Mask | Bool[Array, "..."] | None,
    biased: bool,
    q_at: Coordinates,
    kv_at: Coordinates,
) -> tuple[Grid, Schedule]:
    """The grid for B, K, N / K, T and S that costs least, and its schedule.

    Where the visited tiles are only known at run time the grid has the smaller tiles, which leave out more.
    """
    plans = [(grid, schedule(grid, mask, biased, q_at, kv_at)) for grid in (_cut(*shape, n) for n in _QUERIES)]
    return min(plans, key=lambda plan: _cost(*plan))


def _cost(grid: Grid, schedule: Schedule) -> int:
    number = sum(steps.at.shape[0] for steps in (schedule.partial, schedule.full) if steps.count is None)
    return number * (grid.lanes * grid.queries * grid.group * grid.keys + _STEP)


def _cut(batch: int, num_kv_heads: int, group: int, length: int, size: int, columns: int) -> Grid:
    """A grid of tiles of about `columns` queries, counted for each head of a group, and `_KEYS` keys."""
    tiles = max(1, round(length * group / columns))
    queries = length if tiles == 1 else math.ceil(length / tiles / _VECTOR) * _VECTOR
    block, keys = (_BLOCK, _KEYS) if size > _KEYS else (size, size)
    scores = queries * group * keys
    one_step = queries == length and keys == size and batch * num_kv_heads * scores <= _AT_ONCE
    limit = batch * num_kv_heads if one_step else max(1, _LANES * _QUERIES[0] * _KEYS // scores)
    return Grid(batch, num_kv_heads, group, length, size, _most_lanes(batch, num_kv_heads, limit), queries, block, keys)


def _most_lanes(batch: int, num_kv_heads: int, limit: int) -> int:
    heads = max(n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and n <= max(1, limit))
    if heads < num_kv_heads:
        return heads
    return num_kv_heads * max(
        n for n in range(1, batch + 1) if batch % n == 0 and n * num_kv_heads <= max(limit, heads)
    )


def schedule(
    grid: Grid, mask: Mask | Bool[Array, "..."] | None, biased: bool, q_at: Coordinates, kv_at: Coordinates
) -> Schedule:
    """Which tiles are visited, decided at trace time where mask and coordinates are known there.

    A single tile of queries and keys is always visited: a loop that asks would cost more than it saves.

    `biased` tells that a bias may hide pairs, so that no tile is known to be full; nor is one that pads.
    """
    reach = _reach(grid, mask, q_at, kv_at)
    if grid.counts[1:] == (1, 1) and isinstance(reach.some, jax.Array):
        reach = Reach(some=np.ones((1, 1, 1), bool), every=np.zeros((1, 1, 1), bool))
    whole_queries = np.arange(1, grid.counts[1] + 1) * grid.queries <= grid.length
    every = reach.every & np.bool_(not biased) & whole_queries[None, :, None]
    some = _lanes(grid, reach.some).any(axis=1)
    every = _lanes(grid, every).all(axis=1)
    begin = _begin(some, grid.keys // grid.block)
    full = begin & _all_blocks(grid, every)
    return Schedule(partial=_steps(begin & ~full), full=_steps(full))


def _begin(some: np.ndarray | Array, blocks: int) -> np.ndarray | Array:
    """Where tiles begin, `[..., blocks of keys]`: at each block with work that no tile before it covers."""
    if blocks == 1:
        return some

    def step(left: np.ndarray | Array, here: np.ndarray | Array) -> tuple[np.ndarray | Array, np.ndarray | Array]:
        begins = here & (left == 0)
        return xp.maximum(xp.where(begins, blocks, left) - 1, 0), begins

    xp = jnp if isinstance(some, jax.Array) else np
    # Zeros made of `some` differ on each device of a `jax.shard_map` if it does, as the carry of a scan must.
    left, columns = (some[..., 0] & np.False_).astype(np.int32), xp.moveaxis(some, -1, 0)
    if isinstance(some, jax.Array):
        return jnp.moveaxis(jax.lax.scan(step, left, columns)[1], 0, -1)
    begins = []
    for here in columns:
        left, begin = step(left, here)
        begins.append(begin)
    return np.stack(begins, axis=-1)


def _all_blocks(grid: Grid, every: np.ndarray | Array) -> np.ndarray | Array:
    """Whether every pair may attend in the tile that begins at a block, with no padding in it."""
    blocks = grid.keys // grid.block
    xp = jnp if isinstance(every, jax.Array) else np
    real = np.arange(grid.counts[2]) * grid.block + grid.keys <= grid.size
    passed = xp.cumsum(xp.pad(every, ((0, 0), (0, 0), (1, blocks - 1))), axis=-1, dtype=np.int32)
    return (passed[..., blocks:] - passed[..., :-blocks] == blocks) & real[None, None]


def _reach(grid: Grid, mask: Mask | Array | None, q_at: Coordinates, kv_at: Coordinates) -> Reach:
    """What the mask says of each tile: `[B or 1, tiles of queries or 1, blocks of keys or 1]`."""
    if mask is None:
        return Reach(some=np.ones((1, 1, 1), bool), every=np.ones((1, 1, 1), bool))
    if not isinstance(mask, Mask):
        return _reach_of_array(grid, mask)
    query = jax.tree.map(lambda x: x[:, :, None], Tile.of(split(q_at, grid.queries)))
    key = jax.tree.map(lambda x: x[:, None, :], Tile.of(split(kv_at, grid.block)))
    return mask.reach(query, key)


def _reach_of_array(grid: Grid, mask: Bool[Array, "..."]) -> Reach:
    (tiles_of_queries, blocks), (length, size) = grid.counts[1:], mask.shape[2:]
    queries = (1, 1) if length == 1 else (tiles_of_queries, grid.queries)
    keys = (1, 1) if size == 1 else (blocks, grid.block)
    margin = ((0, 0), (0, 0), (0, queries[0] * queries[1] - length), (0, keys[0] * keys[1] - size))

    def tiles(filler: bool) -> Array:
        return jnp.pad(mask, margin, constant_values=filler).reshape(*mask.shape[:2], *queries, *keys)

    return Reach(some=tiles(False).any(axis=(1, 3, 5)), every=tiles(True).all(axis=(1, 3, 5)))


def split(at: Coordinates, tile: int) -> Coordinates:
    """Coordinates `[rows, length]` as `[rows, tiles, tile]`; the last one is repeated behind the end."""
    length = at.shape[-1]
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, tile), pad(at, -(-length // tile) * tile))


def pad(at: Coordinates, length: int) -> Coordinates:
    """Coordinates `[rows, length]`; the last one is repeated, so that it widens no tile."""

    def field(x: Array | np.ndarray) -> Array | np.ndarray:
        xp = jnp if isinstance(x, jax.Array) else np
        return xp.pad(x, ((0, 0), (0, length - x.shape[1])), mode="edge")

    return jax.tree.map(field, at)


def _lanes(grid: Grid, x: Truth) -> Any:
    """`[B or 1, ...]` as `[tiles of lanes, rows in a tile, tiles of queries, tiles of keys]`."""
    xp = jnp if isinstance(x, jax.Array) else np
    full = xp.broadcast_to(x, (grid.batch, *grid.counts[1:])).reshape(-1, grid.rows, *grid.counts[1:])
    return xp.repeat(full, grid.num_kv_heads // grid.heads, axis=0)


def _steps(visit: np.ndarray | Array) -> Steps:
    if not isinstance(visit, jax.Array):
        return Steps(np.argwhere(visit).astype(np.int32), None)
    order = jnp.argsort(~visit.reshape(-1), stable=True)
    at = jnp.stack(jnp.unravel_index(order, visit.shape), axis=-1).astype(jnp.int32)
    return Steps(at, visit.sum(dtype=jnp.int32))
