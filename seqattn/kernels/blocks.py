"""The tiles that a mask reaches, as lists for kernels whose grid visits nothing else.

A kernel on a device has a grid, not a loop: each step of the grid is one tile of queries and one of keys. The lists
tell each step which tiles it has, so that an empty tile costs nothing, whether the mask is known at trace time or not.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from seqattn.coordinates import Coordinates, Tile
from seqattn.mask import Mask, Reach
from seqattn.pytrees import pytree

EMPTY, PARTIAL, FULL = 0, 1, 2
"""The kind of a tile: no pair is visible, some may be masked, all are visible."""

FIRST, LAST, KIND = 1, 2, 4
"""The bits of a step: whether it is the first or the last of its outer tile, and the kind of the tile times `KIND`."""

_PARTS, _MOST_PARTS = 4, 2**18
"""Parts of a tile along each side, and the most parts of all tiles of a row, that are asked what the mask reaches."""


@pytree
@dataclasses.dataclass(frozen=True)
class Steps:
    """The tiles to visit, in order: all inner tiles of an outer one follow each other.

    An outer tile without visible pairs has one step of kind EMPTY, so that its result is written. Entries from `count`
    on have no flags.

    Attributes:
        row: `[steps]` integers, the batch row; 0 if the rows share the list.
        outer: `[steps]`, the outer tile: of queries, or of keys in the transposed lists.
        inner: `[steps]`, the inner tile.
        flags: `[steps]`, the bits FIRST and LAST, and the kind times KIND.
        count: the number of steps to visit, or None if it was known at trace time: then all are visited.
    """

    row: Any
    outer: Any
    inner: Any
    flags: Any
    count: Any

    @staticmethod
    def of(kinds: np.ndarray | Array) -> "Steps":
        """Returns the steps of tiles `[B or 1, outer tiles, inner tiles]`, given the kind of each."""
        xp: Any = jnp if isinstance(kinds, jax.Array) else np
        visit: Any = kinds != EMPTY
        # One step for an outer tile that sees nothing: at the first inner tile.
        nothing = ~visit.any(axis=-1, keepdims=True)
        visit = visit | (nothing & (np.arange(kinds.shape[-1]) == 0)[None, None])
        before, number = xp.cumsum(visit, axis=-1, dtype=np.int32), visit.sum(axis=-1, keepdims=True, dtype=np.int32)
        bits = xp.where(before == 1, np.int32(FIRST), np.int32(0)) | xp.where(
            before == number, np.int32(LAST), np.int32(0)
        )
        flags = kinds.astype(np.int32) * np.int32(KIND) | bits
        if xp is np:
            row, outer, inner = (x.astype(np.int32) for x in np.nonzero(visit))
            return Steps(row, outer, inner, flags[visit], None)
        # Shapes are static under `jit`: list all tiles, visited ones first and in their order.
        flat, count = visit.reshape(-1), visit.sum(dtype=jnp.int32)
        order = jnp.argsort(~flat, stable=True)
        at = [x.astype(jnp.int32) for x in jnp.unravel_index(order, visit.shape)]
        return Steps(at[0], at[1], at[2], jnp.where(flat, flags.reshape(-1), 0)[order], count)

    @property
    def size(self) -> int:
        """The number of entries of the lists."""
        return int(self.flags.shape[0])


def kinds_of_tiles(
    mask: Mask | Array | None, q_at: Coordinates, kv_at: Coordinates, queries: int, keys: int
) -> np.ndarray | Array:
    """Returns the kind of each tile, `[B or 1, query tiles, key tiles]` int32.

    A NumPy array if mask and coordinates are known at trace time. A tile with padding is never full: kernels hide the
    padding where they evaluate the mask.

    Args:
        mask: a `Mask`, a boolean array `[B or 1, N or 1, T or 1, S or 1]`, or None.
        q_at: coordinates of the queries, `[B or 1, T]`.
        kv_at: coordinates of the keys, `[B or 1, S]`.
        queries: queries in a tile.
        keys: keys in a tile.
    """
    lengths, sizes = (q_at.shape[-1], kv_at.shape[-1]), (queries, keys)
    tiles = [-(-length // tile) for length, tile in zip(lengths, sizes, strict=True)]
    reach = _by_parts(mask, q_at, kv_at, sizes, tiles)
    # Padding makes a tile partial: its keys must be hidden, and its queries must see nothing.
    whole = [np.arange(1, n + 1) * tile <= length for n, tile, length in zip(tiles, sizes, lengths, strict=True)]
    every = reach.every & (whole[0][:, None] & whole[1])[None]
    xp = jnp if isinstance(reach.some, jax.Array) or isinstance(every, jax.Array) else np
    kinds = xp.where(reach.some, xp.where(every, np.int32(FULL), np.int32(PARTIAL)), np.int32(EMPTY))
    return xp.broadcast_to(kinds, (kinds.shape[0], *tiles))


def visits(number: int | None, total: int, queries: int, keys: int) -> str:
    """Returns the note for `explain` on the tiles that a kernel visits; `number` is None if only the program knows."""
    tiles = f"tiles of {queries} queries and {keys} keys"
    if number is None:
        return f"finds out at run time which {tiles} to visit"
    # A share: kernels differ in whether heads and rows have tiles of their own.
    return f"visits {number / total:.1%} of the {tiles}"


def note(call: Any, queries: int, keys: int) -> str | None:
    """Returns `visits` for a kernel whose grid has these tiles; None for a boolean array, which is long to read."""
    if call.mask is not None and not isinstance(call.mask, Mask):
        return None
    kinds = kinds_of_tiles(call.mask, call.q_at, call.kv_at, queries, keys)
    number = int((kinds != EMPTY).sum()) if isinstance(kinds, np.ndarray) else None
    return visits(number, kinds.size, queries, keys)


def _by_parts(
    mask: Mask | Array | None, q_at: Coordinates, kv_at: Coordinates, sizes: tuple[int, int], tiles: Sequence[int]
) -> Reach:
    """Returns the reach of tiles, from that of their parts.

    A tile that holds the end of a document and the beginning of the next has wide ranges of positions and segments,
    which say little. So a tile is cut into equal parts, and each part in two: the tokens of its first segment, and all
    others. 16 documents in 8,192 tokens reach 34 of 256 tiles in this way, as few as there are, and 52 by whole tiles.
    """
    parts = math.gcd(_PARTS, *sizes)
    while parts > 1 and math.prod(tiles) * parts**2 > _MOST_PARTS:
        parts //= 2
    if not isinstance(mask, Mask):
        return reach_of_tiles(mask, q_at, kv_at, *sizes)
    query, key = (
        _boxes(split(pad(at, n * size), size // parts)) for at, n, size in zip((q_at, kv_at), tiles, sizes, strict=True)
    )
    # `Mask.reach` broadcasts over three dims: rows, boxes of queries, boxes of keys.
    query = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, 1), query)
    key = jax.tree.map(lambda x: x.reshape(x.shape[0], 1, -1), key)
    reach = mask.reach(query, key)

    def of_tiles(x: Any) -> Any:
        xp, x = (jnp if isinstance(x, jax.Array) else np), _with_dims(x)
        whole = xp.broadcast_to(x, (x.shape[0], *(n * 2 * parts for n in tiles)))
        return whole.reshape(x.shape[0], tiles[0], 2 * parts, tiles[1], 2 * parts)

    return Reach(some=of_tiles(reach.some).any(axis=(2, 4)), every=of_tiles(reach.every).all(axis=(2, 4)))


def _boxes(at: Coordinates) -> Tile:
    """Returns two tiles for each run of tokens `[rows, runs, length]`, with fields `[rows, runs, 2]`.

    The first holds the tokens of the run's first segment and the second all others. If there are no others, both hold
    the same.
    """
    segment = at.segment
    xp = jnp if isinstance(segment, jax.Array) else np
    first = segment == segment[..., :1]
    other = xp.where(first.all(axis=-1, keepdims=True), first, ~first)

    def ends(x: Any) -> tuple[Any, Any]:
        xp, least, most = (jnp if isinstance(x, jax.Array) else np), [], []
        for chosen in (first, other):
            xp = jnp if isinstance(chosen, jax.Array) else xp
            info = np.iinfo(x.dtype)
            least.append(xp.where(chosen, x, np.array(info.max, x.dtype)).min(axis=-1))
            most.append(xp.where(chosen, x, np.array(info.min, x.dtype)).max(axis=-1))
        return xp.stack(least, axis=-1), xp.stack(most, axis=-1)

    axes = [ends(x) for x in at.axes]
    position, segments = ends(at.position), ends(segment)
    return Tile(*position, *segments, tuple(x for x, _ in axes), tuple(x for _, x in axes))


def reach_of_tiles(mask: Mask | Array | None, q_at: Coordinates, kv_at: Coordinates, queries: int, keys: int) -> Reach:
    """Returns what the mask says of each tile, `[B or 1, query tiles or 1, key tiles or 1]`.

    It takes the arguments of `kinds_of_tiles`.
    """
    if mask is None:
        return Reach(some=np.ones((1, 1, 1), bool), every=np.ones((1, 1, 1), bool))
    if not isinstance(mask, Mask):
        return _reach_of_array(mask, (q_at.shape[-1], kv_at.shape[-1]), (queries, keys))
    # Shapes `[rows, tiles, 1]` and `[rows, 1, tiles]` make `Mask.reach` broadcast over all pairs of tiles.
    query = jax.tree.map(lambda x: x[:, :, None], Tile.of(split(q_at, queries)))
    key = jax.tree.map(lambda x: x[:, None, :], Tile.of(split(kv_at, keys)))
    reach = mask.reach(query, key)
    return Reach(_with_dims(reach.some), _with_dims(reach.every))


def _with_dims(x: Any) -> Any:
    """Returns an answer for all tiles, such as that of a mask without `reach`, with the dims of one for each tile."""
    if jnp.ndim(x) == 3:
        return x
    return x.reshape(1, 1, 1) if isinstance(x, jax.Array) else np.reshape(x, (1, 1, 1))


def _reach_of_array(mask: Bool[Array, "..."], lengths: tuple[int, int], tiles: tuple[int, int]) -> Reach:
    """Returns the reach of a boolean array, reduced over each tile."""
    shape, margin = [], [(0, 0), (0, 0)]
    for present, length, tile in zip(mask.shape[2:], lengths, tiles, strict=True):
        # A dim of size 1 is shared by all tiles.
        count = -(-length // tile)
        shape += [1, 1] if present == 1 else [count, tile]
        margin += [(0, 0 if present == 1 else count * tile - length)]

    def padded(filler: bool) -> Array:
        return jnp.pad(mask, margin, constant_values=filler).reshape(*mask.shape[:2], *shape)

    # The padding must not decide: it counts as masked for `some` and as visible for `every`.
    return Reach(some=padded(False).any(axis=(1, 3, 5)), every=padded(True).all(axis=(1, 3, 5)))


def split(at: Coordinates, tile: int) -> Coordinates:
    """Returns coordinates `[rows, length]` as `[rows, tiles, tile]`, padded by repeating the last one."""
    length = at.shape[-1]
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, tile), pad(at, -(-length // tile) * tile))


def pad(at: Coordinates, length: int) -> Coordinates:
    """Returns coordinates padded to `[rows, length]`. Repeating the last one widens the range of no tile."""

    def field(x: Array | np.ndarray) -> Array | np.ndarray:
        xp = jnp if isinstance(x, jax.Array) else np
        return xp.pad(x, ((0, 0), (0, length - x.shape[1])), mode="edge")

    return jax.tree.map(field, at)
