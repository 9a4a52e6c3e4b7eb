"""Several examples in one row, each a segment of its own: one static shape, and hardly any padding."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

_OPEN = 64
"""Rows that examples are put into at a time."""


def capacities(rows: Sequence[tuple[Any, Sequence[int] | np.ndarray]], longest: int) -> tuple[int, int]:
    """How many tokens of source and of target a packed row has room for: `longest` on the side that has more of them.

    The other side has room in proportion, and at least for its longest text. Of a target of T + 1 tokens T are packed.

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
    """Examples, in an order that the seed decides, each in the first row of some that has room for it.

    Args:
        rows: source and target ids.
        source: room for tokens of sources in a row.
        target: room for tokens of targets, which lose their last one as inputs, and their first one as labels.
        seed: decides which examples meet.

    Returns:
        Rows of int32: `source`, `source_segment` and `source_position` `[source]`, and `target`, `label`,
        `target_segment` and `target_position` `[target]`. Segments count from 1 and agree on both sides; 0 is padding.
    """
    room = {"source": source, "target": target, "label": target}
    elements = [
        {name: np.array(ids, np.int32) for name, ids in zip(room, (source_ids, ids[:-1], ids[1:]), strict=True)}
        for source_ids, ids in rows
    ]
    # Elements that are there already need no thread that fetches them ahead, which takes five times as long.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    shuffled = grain.MapDataset.source(elements).seed(seed).shuffle().to_iter_dataset(options)
    return list(map(_row, _packed(shuffled, room)))


def _packed(elements: grain.IterDataset, room: dict[str, int]) -> Iterator[dict[str, np.ndarray]]:
    return iter(FirstFitPackIterDataset(elements, length_struct=room, num_packing_bins=_OPEN, shuffle_bins=False))


def _row(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A row by our names."""
    sides = {
        f"{side}_{ours}": packed[f"{side}_{theirs}"]
        for side in ("source", "target")
        for ours, theirs in (("segment", "segment_ids"), ("position", "positions"))
    }
    return {name: packed[name] for name in ("source", "target", "label")} | sides
