"""A call for the TPU kernel, split into a static plan and the arrays that the compiled program receives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqattn.kernels import blocks, on_tile
from seqattn.kernels.block_mask import Visits
from seqattn.kernels.blocks import Steps
from seqattn.kernels.call import Call
from seqattn.kernels.counters import first_counters
from seqattn.kernels.per_pair import BATCH, HEAD, Cut, Late, arguments_of, cut
from seqattn.kernels.tpu.tiles import Tiles
from seqattn.kernels.traced import TracedMask, capture
from seqattn.pytrees import pytree, static

MOST_WORDS = 250_000
"""The most words of the memory for scalars, of 262,144, which holds four lists of steps and the scalars of borders."""

WIDEST = 512
"""The largest head dim. 1,024 was refused for a v5e: its tiles exceed the memory for vectors."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call.

    Attributes:
        sizes: B, N, K, T, S, H and V.
        dtype: the dtype of query, key and value.
        tiles: queries and keys in a tile.
        mask: the operations of the mask for each pair, or None.
        score_mod: the operations of the score modification for each pair, or None.
        dropout_rate: 0 if there is no dropout.
        shared: whether all batch rows visit the same tiles.
        interpret: whether Pallas interprets the kernel, without a TPU.
    """

    sizes: tuple[int, int, int, int, int, int, int]
    dtype: np.dtype
    tiles: Tiles
    mask: Late | None
    score_mod: Late | None
    dropout_rate: float
    shared: bool
    interpret: bool

    @property
    def group(self) -> int:
        """The number of query heads that share a key head."""
        return self.sizes[1] // self.sizes[2]

    @property
    def padded(self) -> tuple[int, int]:
        """T and S, rounded up to whole tiles."""
        return self.tiles.padded(*self.sizes[3:5])

    @property
    def trained(self) -> list[tuple[int, int]]:
        """The borders of the score modification that have gradients, each with its number of entries."""
        borders = () if self.score_mod is None else self.score_mod.borders
        return [(i, border.entries) for i, border in enumerate(borders) if border.trains]


@pytree
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a call. Those with gradients come first.

    Attributes:
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, V]`.
        scale: a scalar, float32.
        mod: the borders of the score modification, `[B or 1, N or 1, L]`.
        mask: the borders of the mask, of the same form; or one boolean array `[B or 1, N or 1, T or 1, S or 1]`.
        words: two words of the dropout key.
        base: `[B, N, 2]` integers: the row and the column at which dropout starts to count.
        steps: the tiles to visit for each tile of queries, if they are known at trace time.
        transposed: the tiles to visit for each tile of keys, if they are known at trace time.
        kinds: the kind of each tile if they are not: `[B or 1, tiles of queries, tiles of keys]`.
    """

    query: Any
    key: Any
    value: Any
    scale: Any
    mod: Any
    mask: Any
    words: Any
    base: Any
    steps: Any
    transposed: Any
    kinds: Any

    def lists(self, *, transposed: bool) -> Steps:
        """Returns the tiles to visit for each tile of queries or, transposed, for each tile of keys."""
        if self.kinds is None:
            return self.transposed if transposed else self.steps
        return Steps.of(self.kinds.swapaxes(1, 2) if transposed else self.kinds)


@pytree
@dataclasses.dataclass(frozen=True)
class Found:
    """The tiles of a call, and the lists of those to visit.

    Attributes:
        steps: the tiles to visit for each tile of queries, or None if `kinds` tells them where the kernel is lowered.
        transposed: the tiles to visit for each tile of keys, or None likewise.
        kinds: the kind of each tile, `[B or 1, tiles of queries, tiles of keys]`, or None.
        sizes: B, T and S of the call.
        tiles: queries and keys in a tile.
        shared: whether all batch rows visit the same tiles.
    """

    steps: Steps | None
    transposed: Steps | None
    kinds: Any
    sizes: tuple[int, int, int] = static()
    tiles: Tiles = static()
    shared: bool = static()

    @property
    def number(self) -> int:
        """The number of entries of a list."""
        if self.steps is None or self.transposed is None:
            return int(self.kinds.size)
        return max(self.steps.size, self.transposed.size)


def _tiles(call: Call) -> tuple[tuple[int, int, int], Tiles]:
    """Returns B, T and S of a call, and its tiles."""
    (batch, length, _, head_dim), (_, size, _, value_dim) = call.query.shape, call.value.shape
    return (batch, length, size), Tiles.of(length, size, max(head_dim, value_dim))


def find(call: Call, *, listed: bool = True) -> Found:
    """Returns the tiles that a call visits.

    Args:
        call: the call.
        listed: if False, lists that only the program knows are left to where the kernel is lowered.
    """
    sizes, tiles = _tiles(call)
    kinds = blocks.kinds_of_tiles(call.mask, call.q_at, call.kv_at, tiles.queries, tiles.keys)
    shared = kinds.shape[0] == 1
    # NumPy builds the lists at once; then the grid is known as well.
    if listed or isinstance(kinds, np.ndarray):
        return Found(Steps.of(kinds), Steps.of(kinds.swapaxes(1, 2)), None, sizes, tiles, shared)
    return Found(None, None, kinds, sizes, tiles, shared)


def prepare(call: Call, *, interpret: bool) -> tuple[Plan, Operands]:
    """Returns the plan and the arrays of a call.

    Raises:
        NotImplementedError: the kernel cannot compute the mask or the score modification, or a memory is too small.
    """
    batch, length, num_heads, head_dim = call.query.shape
    size, num_kv_heads, value_dim = call.value.shape[1:]
    found = Visits.of(call, "tpu")
    # The tiles are decided by the mask itself. The kernel evaluates its trace, as it must not hold a user's function.
    if found is None or (found.sizes, found.tiles) != _tiles(call):
        found = find(call, listed=False)
    traced, mask, mod = _cut_all(call)
    _check_memory(found.number, _scalars(call, mask, mod))
    rate = 0.0 if call.dropout is None else call.dropout.rate
    plan = Plan(
        (batch, num_heads, num_kv_heads, length, size, head_dim, value_dim),
        np.dtype(call.query.dtype),
        found.tiles,
        None if mask is None else mask.late,
        None if mod is None else mod.late,
        rate,
        found.shared,
        interpret,
    )
    return plan, Operands(
        call.query,
        call.key,
        call.value,
        jnp.asarray(call.scale, jnp.float32),
        [] if mod is None else _borders(traced, traced.score_mod.program, mod),
        call.mask if mask is None else _borders(traced, traced.mask.program, mask),
        None if rate == 0 else call.dropout.words(),
        None if rate == 0 else first_counters(call),
        found.steps,
        found.transposed,
        found.kinds,
    )


def check(call: Call) -> None:
    """Raises NotImplementedError if the kernel cannot compute the mask or the score modification of a call."""
    length, size = call.query.shape[1], call.key.shape[1]
    _, tiles = _tiles(call)
    queries, keys = tiles.padded(length, size)
    number = call.query.shape[0] * (queries // tiles.queries) * (keys // tiles.keys)
    _, mask, mod = _cut_all(call)
    # A grid with few tiles is within the limit whatever its mask. Else the mask tells how many are visited.
    if _words(number, _scalars(call, mask, mod)) > MOST_WORDS:
        prepare(call, interpret=False)


def _words(steps: int, scalars: int) -> int:
    """Returns the size of four lists of steps and of the scalars."""
    return 4 * steps + scalars


def _check_memory(steps: int, scalars: int) -> None:
    if (words := _words(steps, scalars)) > MOST_WORDS:
        raise NotImplementedError(
            f"{steps} pairs of tiles and {scalars} numbers for rows and heads take {words} words; the memory for "
            f"scalars holds {MOST_WORDS}"
        )


def _scalars(call: Call, *parts: Cut | None) -> int:
    """Returns how many scalars a kernel reads: tables, numbers for rows and heads, and where dropout begins."""
    batch, _, num_heads, _ = call.query.shape
    number = 0 if call.dropout is None or call.dropout.rate == 0 else 2 * batch * num_heads
    for late in (part.late for part in parts if part is not None):
        for border, known in zip(late.borders, late.tables, strict=True):
            if known is None and not border.by_token:
                each = (batch if BATCH in border.reads else 1) * (num_heads if HEAD in border.reads else 1)
                number += each * border.entries
    return number


def _cut_all(call: Call) -> tuple[Call, Cut | None, Cut | None]:
    """Returns the call with traced functions, and its mask and score modification in two parts."""
    traced = capture(call, like=call)
    mask = _cut(traced, traced.mask.program, mod=False) if isinstance(traced.mask, TracedMask) else None
    mod = None if call.score_mod is None else _cut(traced, traced.score_mod.program, mod=True)
    return traced, mask, mod


def _cut(call: Call, program: Any, *, mod: bool) -> Cut:
    """Returns the program of a call in two parts, if the kernel can compute the inner one."""
    result = cut(program, arguments_of(call.q_at, call.kv_at, mod=mod, rows=mod and call.rows is not None))
    on_tile.check(result.late, on_tile.TPU)
    return result


def _borders(call: Call, program: Any, parts: Cut) -> list[Array]:
    batch, _, num_heads, _ = call.query.shape
    query, key = (jax.tree.leaves(at) for at in (call.q_at, call.kv_at))
    return parts.borders((*program.arrays, *program.fixed), query, key, batch, num_heads)
