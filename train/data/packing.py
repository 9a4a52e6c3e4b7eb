"""Packing: several examples in one row, each with its own segment; one static shape, and hardly any padding."""

from array import array
from collections.abc import Sequence
from typing import Any, overload

import grain
import numpy as np

_OPEN = 64
"""Number of open rows; each example goes into the first open row with room for it."""
_TOGETHER = 10_000
"""Number of examples whose lengths are Python numbers at a time."""


def capacities(lengths: np.ndarray, longest: int) -> tuple[int, int]:
    """Computes the number of source and target tokens that a packed row has room for.

    The side with more tokens over all examples gets `longest`. The other side gets room in proportion, so that both
    sides of a row fill up together, and at least for its longest text. A target of T + 1 tokens needs T places, as
    inputs and labels are the target without its last and its first token.

    Args:
        lengths: number of source and target tokens of each of n examples, `[n, 2]`.
        longest: number of tokens of the longer side.

    >>> capacities(np.array([[4, 9], [2, 5]]), 24)
    (12, 24)
    """
    needed = lengths - np.array([0, 1], lengths.dtype)
    total = needed.sum(axis=0, dtype=np.int64)
    source, target = np.maximum(np.ceil(longest * (total / max(1, total.max()))).astype(int), needed.max(axis=0))
    return int(source), int(target)


class Packed(Sequence[dict[str, np.ndarray]]):
    """Packed rows, each made from its examples when it is read.

    A row has the int32 arrays `source`, `source_segment` and `source_position` `[source]`, and `target`, `label`,
    `target_segment` and `target_position` `[target]`. Segments count from 1 and are the same on both sides; 0 is
    padding. Positions count from 0 in each segment.

    Args:
        rows: the examples.
        members: the numbers of the examples of all rows, one row after another.
        ends: the end of each row in `members`.
        source: number of source tokens that a row has room for.
        target: number of target tokens that a row has room for.
    """

    def __init__(self, rows: Sequence[Any], members: np.ndarray, ends: np.ndarray, source: int, target: int) -> None:
        self._rows, self._members, self._ends = rows, members, ends
        self._room = {"source": source, "target": target}

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, np.ndarray]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, np.ndarray] | list[dict[str, np.ndarray]]:
        """Makes a row, or several."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError beyond the end, which ends an iteration
        first = self._ends[number - 1] if number else 0
        row = {
            f"{side}{kind}": np.zeros(room, np.int32)
            for side, room in self._room.items()
            for kind in ("", "_segment", "_position")
        } | {"label": np.zeros(self._room["target"], np.int32)}
        used = dict.fromkeys(self._room, 0)
        for segment, member in enumerate(self._members[first : self._ends[number]], 1):
            source, target = self._rows[int(member)]
            for side, ids in (("source", source), ("target", target[:-1])):
                at = slice(used[side], used[side] + len(ids))
                row[side][at], row[f"{side}_segment"][at] = ids, segment
                row[f"{side}_position"][at] = np.arange(len(ids))
                if side == "target":
                    row["label"][at] = target[1:]
                used[side] = at.stop
        return row


def pack(
    rows: Sequence[Any], chosen: np.ndarray, lengths: np.ndarray, source: int, target: int, *, seed: int
) -> Packed:
    """Packs examples into rows by first fit, in a random order.

    It looks at lengths alone: tokens are read when a row is.

    Args:
        rows: source and target ids of all examples.
        chosen: the numbers of the n examples to pack, `[n]`.
        lengths: their numbers of source and target tokens, `[n, 2]`.
        source: number of source tokens that a row has room for.
        target: number of target tokens that a row has room for; inputs lack the last token of a target, and labels the
            first one.
        seed: decides the order, and so which examples share a row.
    """
    shuffled = grain.MapDataset.source(range(len(chosen))).seed(seed).shuffle()
    order = np.fromiter((shuffled[step] for step in range(len(chosen))), np.int64, len(chosen))
    members, ends = _first_fit(order, np.maximum(lengths - np.array([0, 1], lengths.dtype), 0), (source, target))
    return Packed(rows, chosen[members], ends, source, target)


def _first_fit(order: np.ndarray, needed: np.ndarray, room: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Assigns examples to rows as grain's `FirstFitPackIterDataset` does, which takes fifty times as long.

    An example goes into the first of 64 open rows with room for it on both sides. If there is none, all 64 rows are
    closed.

    Args:
        order: the numbers of the examples, in the order in which they are packed, `[n]`.
        needed: the places that each example needs on both sides, `[n, 2]`.
        room: the places of a row.

    Returns:
        The numbers of the examples of all rows, one row after another, and the end of each row among them.
    """
    members, ends = array("q"), array("q")
    left = np.empty((2, _OPEN), np.int64)
    opened: list[list[int]] = []

    def close() -> None:
        for row in opened:
            members.extend(row)
            ends.append(len(members))
        opened.clear()
        left.T[:] = room

    close()
    for first in range(0, len(order), _TOGETHER):
        several = order[first : first + _TOGETHER]
        for number, (source, target) in zip(several.tolist(), needed[several].tolist(), strict=True):
            fits = (left[0] >= source) & (left[1] >= target)
            row = int(fits.argmax())
            if not fits[row]:
                close()
                row = 0
            if row == len(opened):  # rows are opened in order, so a row behind the last one is the next
                opened.append([])
            opened[row].append(number)
            left[0, row] -= source
            left[1, row] -= target
    close()
    return np.asarray(members), np.asarray(ends)
