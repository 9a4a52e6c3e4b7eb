"""A call for the Hopper kernel, split into a static plan and the arrays that the compiled program receives."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqattn.kernels import blocks
from seqattn.kernels.call import Call
from seqattn.kernels.counters import first_counters
from seqattn.kernels.hopper.backward_plan import Backward, backward_of
from seqattn.kernels.hopper.protocol import CONSUMERS
from seqattn.kernels.hopper.rule import Rule, rule_of
from seqattn.kernels.hopper.walk import Walk
from seqattn.kernels.traced import TracedMask, capture
from seqattn.pytrees import pytree


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How shared memory is used.

    Attributes:
        queries: queries in the tile of each consumer: 64, the rows of one wgmma. Tiles of 128 rows spill registers.
        keys: keys in a tile, a multiple of 64.
        slots: tiles of keys, and of values, in the ring.
    """

    queries: int
    keys: int
    slots: int

    @property
    def together(self) -> int:
        """Queries of a block: those of both consumers."""
        return CONSUMERS * self.queries


TILINGS = {64: Tiling(64, 128, 3), 128: Tiling(64, 128, 2), 256: Tiling(64, 64, 2)}
"""Tilings by head dim. They compile for an H200 without a spilled register."""

SEARCHING = {64: Tiling(64, 64, 4), 128: Tiling(64, 64, 4)}
"""Tilings of calls that search tables or draw random bits for each pair: both take registers.

At head dim 256 they take too many.
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call.

    Attributes:
        sizes: B, N, K, T, S and H, which is also V.
        dtype: the dtype of query, key and value.
        tiling: how shared memory is used.
        mask: the operations of the mask for each pair, or None.
        score_mod: the operations of the score modification for each pair, or None.
        dropout_rate: 0 if there is no dropout.
        backward: the kernels of the backward pass, or None if `chunked` computes the gradients.
        interpret: an `InterpretGPUParams`, to run the kernel in Pallas's interpreter, or None.
    """

    sizes: tuple[int, int, int, int, int, int]
    dtype: np.dtype
    tiling: Tiling
    mask: Rule | None
    score_mod: Rule | None
    dropout_rate: float
    backward: Backward | None
    interpret: Any

    @property
    def group(self) -> int:
        """How many query heads read each key head."""
        return self.sizes[1] // self.sizes[2]

    @property
    def padded(self) -> tuple[int, int]:
        """T and S, rounded up to whole tiles: those of both consumers, and those of keys."""
        queries, keys = self.tiling.together, self.tiling.keys
        return -(-self.sizes[3] // queries) * queries, -(-self.sizes[4] // keys) * keys


@pytree
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a call.

    Attributes:
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, H]`.
        scale: `[1]`, float32 and positive.
        mask: what the pairs read for the mask, arrays `[B or 1, N or 1, L]`: L is T or S, or the entries of a table.
        mod: what they read for the score modification, of the same form.
        shown: a list of the boolean array `[B or 1, N or 1, T or 1, S or 1]` that takes the place of a mask, or empty.
        bias: a list of an array of the same form that is added to the scores, or empty.
        words: a list of the two words of the dropout key, `[2]`, or empty.
        base: a list of the first row and column of dropout, `[B, N, 2]`, or empty.
        walk: the tiles of keys that each pair of query tiles visits.
        backward: the tiles that each kernel of the backward pass visits, or nothing.
    """

    query: Any
    key: Any
    value: Any
    scale: Any
    mask: Any
    mod: Any
    shown: Any
    bias: Any
    words: Any
    base: Any
    walk: Any
    backward: Any


def prepare(call: Call, *, interpret: Any = None) -> tuple[Plan, Operands]:
    """Returns the plan and the arrays of a call.

    Raises:
        NotImplementedError: the kernel cannot compute the mask or the score modification.
    """
    batch, length, num_heads, head_dim = call.query.shape
    size, num_kv_heads = call.key.shape[1:3]
    traced = capture(call, like=call)
    by_pair = isinstance(traced.mask, TracedMask)
    nothing: tuple[Rule | None, list[Array]] = (None, [])
    mask, of_mask = rule_of(traced, traced.mask.program, mod=False) if by_pair else nothing
    mod, of_mod = nothing if call.score_mod is None else rule_of(traced, traced.score_mod.program, mod=True)
    rate = 0.0 if call.dropout is None else call.dropout.rate
    tiling = _tiling(head_dim, [each.entries for each in (mask, mod) if each is not None], dropped=rate > 0)
    # The tiles are decided by the mask itself. The kernel evaluates its trace, as it must not hold a user's function.
    kinds = blocks.kinds_of_tiles(call.mask, call.q_at, call.kv_at, tiling.together, tiling.keys)
    backward = backward_of(call, (mask, mod))
    plan = Plan(
        (batch, num_heads, num_kv_heads, length, size, head_dim),
        np.dtype(call.query.dtype),
        tiling,
        mask,
        mod,
        rate,
        backward,
        interpret,
    )
    query, scale = _positive(call.query, call.scale)
    return plan, Operands(
        query,
        call.key,
        call.value,
        scale,
        of_mask,
        of_mod,
        [] if by_pair or call.mask is None else [call.mask],
        [] if call.bias is None else [call.bias],
        [] if rate == 0 else [call.dropout.words()],
        [] if rate == 0 else [first_counters(call)],
        Walk.of(kinds),
        () if backward is None else backward.walks(call),
    )


def _tiling(head_dim: int, entries: Sequence[int], *, dropped: bool) -> Tiling:
    """Returns the tiling of a head dim, where each pair searches tables of so many entries or draws random bits."""
    most = max(entries, default=1)
    if most == 1 and not dropped:
        return TILINGS[head_dim]
    if head_dim not in SEARCHING:
        what = "dropout" if dropped else f"a table of {most} entries that each pair searches"
        raise NotImplementedError(f"{what} leaves too few registers at head dim {head_dim}")
    return SEARCHING[head_dim]


_LEAST = 1e-30
"""Takes the place of a scale of 0, with which masked scores would be -inf * 0 = NaN."""


def _positive(query: Array, scale: Any) -> tuple[Array, Array]:
    """Returns queries and a positive scale with the same products: the largest product then has the largest score."""
    if not isinstance(scale, int | float | np.number):
        query = jnp.where(scale < 0, -query, query)
    elif scale < 0:
        query = -query
    return query, jnp.maximum(jnp.abs(jnp.asarray(scale, jnp.float32)), _LEAST).reshape(1)
