"""The grid of tiles over queries and keys, and the schedule of the tiles to compute."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from seqattn.coordinates import Coordinates
from seqattn.kernels.blocks import reach_of_tiles
from seqattn.mask import Mask, Reach, Truth
from seqattn.pytrees import pytree

_VECTOR, _BLOCK = 16, 32
_QUERIES, _KEYS, _LANES = (256, 512), 512, 4
"""On the CPU, XLA runs a product of fewer than 256 * 512 scores on one thread; four such products fit in the cache."""
_AT_ONCE = 2**21
"""The largest number of scores that one step computes, so that short texts need no loop."""
_STEP = 32_000
"""The fixed cost of a step (slices, loop), expressed as a number of scores."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """How one call is cut into tiles.

    A lane is one key head of one batch row. A tile covers a few lanes, a few queries and a few keys. A tile of keys may
    start at any block, so that tiles follow the edge of a window or of a packed document.

    Attributes:
        batch: B, the batch rows of the call.
        num_kv_heads: K, the key heads.
        group: N / K, the query heads that share a key head.
        length: T, the queries of a row.
        size: S, the keys of a row.
        lanes: lanes in a tile. Divides K, or is a multiple of K that divides B * K.
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
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, K, N / K, T and S of the call."""
        return self.batch, self.num_kv_heads, self.group, self.length, self.size

    @property
    def counts(self) -> tuple[int, int, int]:
        """The numbers of lane tiles, query tiles and key blocks."""
        lanes = self.batch * self.num_kv_heads
        return lanes // self.lanes, -(-self.length // self.queries), -(-self.size // self.block)

    @property
    def padded(self) -> tuple[int, int]:
        """T rounded up to whole tiles, and S padded so that a tile may start at every block."""
        _, tiles, blocks = self.counts
        return tiles * self.queries, (blocks - 1) * self.block + self.keys

    @property
    def rows(self) -> int:
        """The number of batch rows in a tile."""
        return max(1, self.lanes // self.num_kv_heads)

    @property
    def heads(self) -> int:
        """The number of key heads in a tile."""
        return min(self.num_kv_heads, self.lanes)


@pytree
@dataclasses.dataclass(frozen=True)
class Steps:
    """The tiles to visit, in order.

    Attributes:
        at: `[steps, 3]` integers. Each row is (lane tile, query tile, key block). None if it is known that there are
            none: in jaxlib 0.11.2 an array without entries that leaves a `jax.shard_map` ends the process.
        count: the number of rows of `at` to visit, or None if it was known at trace time: then all rows are visited.
    """

    at: np.ndarray | Array | None
    count: np.ndarray | Array | None

    @property
    def size(self) -> int:
        """The number of rows of `at`."""
        return 0 if self.at is None else int(self.at.shape[0])


@pytree
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The tiles that contain a visible pair.

    Attributes:
        partial: tiles in which a pair may be masked. The kernel evaluates the mask for each pair.
        full: tiles in which every pair is visible. The kernel skips the mask.
    """

    partial: Steps
    full: Steps


def plan(
    shape: tuple[int, int, int, int, int],
    mask: Mask | Bool[Array, "..."] | None,
    biased: bool,
    q_at: Coordinates,
    kv_at: Coordinates,
) -> tuple[Grid, Schedule]:
    """Returns the cheapest grid for a call, and its schedule.

    If the schedule is only known at run time, all candidates cost the same and the smaller tiles win: they skip more.

    Args:
        shape: B, K, N / K, T and S.
        mask: a `Mask`, a boolean array `[B or 1, N or 1, T or 1, S or 1]`, or None.
        biased: True if the call has a bias, which may mask pairs.
        q_at: coordinates of the queries `[B or 1, T]`.
        kv_at: coordinates of the keys `[B or 1, S]`.
    """
    plans = [(grid, schedule(grid, mask, biased, q_at, kv_at)) for grid in (_cut(*shape, n) for n in _QUERIES)]
    # `min` keeps the first of equal costs. Schedules with traced counts all cost 0 here, so the smaller tiles win.
    return min(plans, key=lambda plan: _cost(*plan))


def size(shape: tuple[int, int, int, int, int]) -> int:
    """Returns the number of blocks that `plan` looks at for a call of this shape, in the grid that has most."""
    return max(math.prod(_cut(*shape, n).counts) for n in _QUERIES)


def _cost(grid: Grid, schedule: Schedule) -> int:
    # A traced schedule has no count at trace time, so it adds nothing to the cost.
    number = sum(steps.size for steps in (schedule.partial, schedule.full) if steps.count is None)
    return number * (grid.lanes * grid.queries * grid.group * grid.keys + _STEP)


def _cut(batch: int, num_kv_heads: int, group: int, length: int, size: int, columns: int) -> Grid:
    """Returns a grid with about `columns` columns (queries times group) and `_KEYS` keys in a tile."""
    # The query heads of a group are columns of the same product, so they count towards its width.
    tiles = max(1, round(length * group / columns))
    # Rounding to the vector width keeps every column slice aligned. A single tile needs no rounding, hence no padding.
    queries = length if tiles == 1 else math.ceil(length / tiles / _VECTOR) * _VECTOR
    block, keys = (_BLOCK, _KEYS) if size > _KEYS else (size, size)
    scores = queries * group * keys
    # A short call takes all its lanes in one step and pays the fixed cost of a step only once.
    one_step = queries == length and keys == size and batch * num_kv_heads * scores <= _AT_ONCE
    limit = batch * num_kv_heads if one_step else max(1, _LANES * _QUERIES[0] * _KEYS // scores)
    return Grid(batch, num_kv_heads, group, length, size, _most_lanes(batch, num_kv_heads, limit), queries, block, keys)


def _most_lanes(batch: int, num_kv_heads: int, limit: int) -> int:
    """Returns the largest number of lanes within `limit` that cuts the B * K lanes into equal tiles."""
    # A tile holds either part of the heads of one row or whole rows: then its coordinates form a rectangle.
    heads = max(n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and n <= max(1, limit))
    if heads < num_kv_heads:
        return heads
    return num_kv_heads * max(
        n for n in range(1, batch + 1) if batch % n == 0 and n * num_kv_heads <= max(limit, heads)
    )


def schedule(
    grid: Grid, mask: Mask | Bool[Array, "..."] | None, biased: bool, q_at: Coordinates, kv_at: Coordinates
) -> Schedule:
    """Returns the tiles to visit, at trace time if mask and coordinates are known there.

    A bias may mask pairs, so with `biased` no tile is full. A tile with padding is never full either.
    """
    reach = _reach(grid, mask, q_at, kv_at)
    # A single tile is always visited: testing it at run time would cost more than it saves.
    if grid.counts[1:] == (1, 1) and isinstance(reach.some, jax.Array):
        reach = Reach(some=np.ones((1, 1, 1), bool), every=np.zeros((1, 1, 1), bool))
    # The last query tile may hold padding queries. They must see nothing, so the tile needs its mask.
    whole_queries = np.arange(1, grid.counts[1] + 1) * grid.queries <= grid.length
    every = reach.every & np.bool_(not biased) & whole_queries[None, :, None]
    # A tile may hold several batch rows. It is visited if any of them needs it, and full only if all are.
    some = _lanes(grid, reach.some).any(axis=1)
    every = _lanes(grid, every).all(axis=1)
    # Full and partial tiles partition the visited tiles: each pair is counted exactly once.
    begin = _begin(some, grid.keys // grid.block)
    full = begin & _all_blocks(grid, every)
    return Schedule(partial=_steps(begin & ~full), full=_steps(full))


def _begin(some: np.ndarray | Array, blocks: int) -> np.ndarray | Array:
    """Returns where tiles start, `[..., key blocks]`: at each block with visible pairs that no earlier tile covers.

    A greedy cover from left to right visits the fewest tiles.
    """
    if blocks == 1:
        return some

    def step(left: np.ndarray | Array, here: np.ndarray | Array) -> tuple[np.ndarray | Array, np.ndarray | Array]:
        begins = here & (left == 0)
        return xp.maximum(xp.where(begins, blocks, left) - 1, 0), begins

    xp = jnp if isinstance(some, jax.Array) else np
    # `left` counts the blocks that the current tile still covers. It is derived from `some` so that it varies over the
    # same axes of a `jax.shard_map`: the carry of a scan must keep its type.
    left, columns = (some[..., 0] & np.False_).astype(np.int32), xp.moveaxis(some, -1, 0)
    if isinstance(some, jax.Array):
        return jnp.moveaxis(jax.lax.scan(step, left, columns)[1], 0, -1)
    begins = []
    for here in columns:
        left, begin = step(left, here)
        begins.append(begin)
    return np.stack(begins, axis=-1)


def _all_blocks(grid: Grid, every: np.ndarray | Array) -> np.ndarray | Array:
    """Returns whether every pair is visible in the tile that starts at each block, without padding in it."""
    blocks = grid.keys // grid.block
    xp = jnp if isinstance(every, jax.Array) else np
    # A tile that reaches past the last key holds padding, which only the mask hides.
    real = np.arange(grid.counts[2]) * grid.block + grid.keys <= grid.size
    # Prefix sums count the full blocks in each window of a tile's width in one pass.
    passed = xp.cumsum(xp.pad(every, ((0, 0), (0, 0), (1, blocks - 1))), axis=-1, dtype=np.int32)
    return (passed[..., blocks:] - passed[..., :-blocks] == blocks) & real[None, None]


def _reach(grid: Grid, mask: Mask | Array | None, q_at: Coordinates, kv_at: Coordinates) -> Reach:
    """Returns what the mask says of each tile, `[B or 1, query tiles or 1, key blocks or 1]`."""
    return reach_of_tiles(mask, q_at, kv_at, grid.queries, grid.block)


def _lanes(grid: Grid, x: Truth) -> Any:
    """Returns `[B or 1, ...]` as `[lane tiles, rows in a tile, query tiles, key blocks]`."""
    xp = jnp if isinstance(x, jax.Array) else np
    # Masks that differ by head are decided for all heads of a row together, so the heads repeat the row's answer.
    full = xp.broadcast_to(x, (grid.batch, *grid.counts[1:])).reshape(-1, grid.rows, *grid.counts[1:])
    return xp.repeat(full, grid.num_kv_heads // grid.heads, axis=0)


def _steps(visit: np.ndarray | Array) -> Steps:
    """Returns the visited tiles as a list, or as a sorted list and a traced count."""
    if not isinstance(visit, jax.Array):
        known = np.argwhere(visit).astype(np.int32)
        return Steps(known if len(known) else None, None)
    # Shapes are static under `jit`: list all tiles, visited ones first, and let the loop stop at `count`. A stable sort
    # keeps the tiles of one query tile together, so its state stays in the cache.
    order = jnp.argsort(~visit.reshape(-1), stable=True)
    at = jnp.stack(jnp.unravel_index(order, visit.shape), axis=-1).astype(jnp.int32)
    return Steps(at, visit.sum(dtype=jnp.int32))
