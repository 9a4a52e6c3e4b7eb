"""The backward pass of a call: which kernels compute it, with which tiles, or why `chunked` computes it."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from seqattn.kernels import blocks
from seqattn.kernels.call import Call
from seqattn.kernels.hopper.protocol import CONSUMERS
from seqattn.kernels.hopper.rule import Rule
from seqattn.kernels.hopper.slope import with_slope
from seqattn.kernels.hopper.walk import Walk


@dataclasses.dataclass(frozen=True)
class Pass:
    """One kernel.

    Attributes:
        owner: the side that owns tiles: "query" or "key".
        results: the gradients that it computes: ("query",), or "key", "value" or both.
        rows: rows in the tile of each consumer: 64, the rows of one wgmma.
        columns: rows in a tile of the other side.
        slots: tiles of each array of the other side in the ring.
    """

    owner: str
    results: tuple[str, ...]
    rows: int
    columns: int
    slots: int

    @property
    def together(self) -> int:
        """Rows of a block: those of both consumers."""
        return CONSUMERS * self.rows

    @property
    def tiles(self) -> tuple[int, int]:
        """Queries and keys of a tile of the lists."""
        return (self.together, self.columns) if self.owner == "query" else (self.columns, self.together)


_OF_QUERIES, _OF_KEYS = ("query", ("query",)), ("key", ("key", "value"))

PASSES: dict[int, tuple[Pass, ...]] = {
    64: (Pass(*_OF_QUERIES, 64, 64, 2), Pass(*_OF_KEYS, 64, 64, 2)),
    128: (Pass(*_OF_QUERIES, 64, 64, 2), Pass(*_OF_KEYS, 64, 32, 4)),
}
"""The kernels by head dim. They compile for an H200 without a spilled register.

At head dim 256 the sums alone take 128 registers of a thread, and the weights with their gradients too many.
"""

NARROW: dict[int, tuple[Pass, ...]] = {
    64: (Pass(*_OF_QUERIES, 64, 32, 4), Pass(*_OF_KEYS, 64, 32, 4)),
    128: (Pass(*_OF_QUERIES, 64, 32, 4), Pass("key", ("key",), 64, 32, 4), Pass("key", ("value",), 64, 32, 4)),
}
"""The kernels of calls that draw random bits, search tables or modify scores by coordinates: all take registers."""


@dataclasses.dataclass(frozen=True)
class Backward:
    """The static part of the backward pass.

    Attributes:
        passes: the kernels.
        score_mod: the operations of the score modification and of its derivative for each pair, or None.
    """

    passes: tuple[Pass, ...]
    score_mod: Rule | None

    def walks(self, call: Call) -> tuple[Walk, ...]:
        """Returns the tiles that each kernel visits."""
        found = []
        for each in self.passes:
            kinds = blocks.kinds_of_tiles(call.mask, call.q_at, call.kv_at, *each.tiles)
            found.append(Walk.of(kinds if each.owner == "query" else kinds.swapaxes(1, 2)))
        return tuple(found)


def backward_of(call: Call, rules: Sequence[Rule | None]) -> Backward | None:
    """Returns the backward pass of a call, or None if `chunked` computes it: see `why_chunked`.

    Args:
        call: the call.
        rules: the mask and the score modification for each pair, each a rule or None.
    """
    mod = rules[1]
    if why_chunked(call, mod) is not None:
        return None
    searched = max((each.entries for each in rules if each is not None), default=1) > 1
    dropped = call.dropout is not None and call.dropout.rate > 0
    by_place = mod is not None and len(mod.late.borders) > 0
    passes = NARROW if searched or dropped or by_place else PASSES
    return Backward(passes[call.query.shape[-1]], None if mod is None else with_slope(mod))


def why_chunked(call: Call, mod: Rule | None) -> str | None:
    """Returns why `chunked` computes the gradients of a call, or None if kernels do.

    They compute the gradients of query, key and value. No other array may need one.
    """
    if call.query.shape[-1] not in PASSES:
        return f"head dim {call.query.shape[-1]} takes too many registers"
    if call.bias is not None:
        return "a bias may need one"
    if isinstance(call.scale, jax.core.Tracer):
        return "the scale, which is traced, may need one"
    if mod is None:
        return None
    if any(border.trains for border in mod.late.borders):
        return "floating arrays of the score_mod may need one"
    try:
        with_slope(mod)
    except NotImplementedError as error:
        return str(error)
    return None


def lengths(passes: Sequence[Pass], length: int, size: int) -> tuple[int, int]:
    """Returns T and S, rounded up to whole tiles of all kernels."""
    queries, keys = (math.lcm(*(each.tiles[i] for each in passes)) for i in range(2))
    return -(-length // queries) * queries, -(-size // keys) * keys
