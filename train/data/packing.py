"""Packing: several examples in one row, each with its own segment; one static shape, and hardly any padding."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

_OPEN = 64
"""Number of open rows; each example goes into the first open row with room for it."""


def capacities(rows: Sequence[tuple[Any, Sequence[int] | np.ndarray]], longest: int) -> tuple[int, int]:
    """Computes the number of source and target tokens that a packed row has room for.

    The side with more tokens over all examples gets `longest`. The other side gets room in proportion, so that both
    sides of a row fill up together, and at least for its longest text. A target of T + 1 tokens needs T places, as
    inputs and labels are the target without its last and its first token.

    >>> capacities([([5] * 4, [6] * 9), ([5] * 2, [6] * 5)], 24)
    (12, 24)
    """
    lengths = np.array([(len(source), len(target) - 1) for source, target in rows])
    shares = lengths.sum(axis=0) / max(1, lengths.sum(axis=0).max())
    source, target = np.maximum(np.ceil(longest * shares).astype(int), lengths.max(axis=0))
    return int(source), int(target)


def pack(
    rows: Sequence[tuple[Any, Sequence[int] | np.ndarray]], source: int, target: int, *, seed: int
) -> list[dict[str, np.ndarray]]:
    """Packs examples into rows by first fit, in a random order.

    Args:
        rows: source and target ids.
        source: number of source tokens that a row has room for.
        target: number of target tokens that a row has room for; inputs lack the last token of a target, and labels the
            first one.
        seed: decides the order, and so which examples share a row.

    Returns:
        Rows of int32 arrays: `source`, `source_segment` and `source_position` `[source]`, and `target`, `label`,
        `target_segment` and `target_position` `[target]`. Segments count from 1 and are the same on both sides; 0 is
        padding. Positions count from 0 in each segment.
    """
    room = {"source": source, "target": target, "label": target}
    elements = [
        {name: np.array(ids, np.int32) for name, ids in zip(room, (source_ids, ids[:-1], ids[1:]), strict=True)}
        for source_ids, ids in rows
    ]
    # No threads: the elements are in memory, and prefetching them takes five times as long.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    shuffled = grain.MapDataset.source(elements).seed(seed).shuffle().to_iter_dataset(options)
    return list(map(_row, _packed(shuffled, room)))


def _packed(elements: grain.IterDataset, room: dict[str, int]) -> Iterator[dict[str, np.ndarray]]:
    return iter(FirstFitPackIterDataset(elements, length_struct=room, num_packing_bins=_OPEN, shuffle_bins=False))


def _row(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames the arrays of a row from grain's names to those of `pack`."""
    sides = {
        f"{side}_{ours}": packed[f"{side}_{theirs}"]
        for side in ("source", "target")
        for ours, theirs in (("segment", "segment_ids"), ("position", "positions"))
    }
    return {name: packed[name] for name in ("source", "target", "label")} | sides
