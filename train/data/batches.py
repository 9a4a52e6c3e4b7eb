"""From examples to batches of few static shapes, in an order that is a function of the seed and the step alone."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from seqattn.checks import check_integer
from train.data.packing import capacities, pack
from train.data.tokenizer import Tokenizer

Example = tuple[list[int] | np.ndarray, list[int] | np.ndarray]
"""Source ids with the end token, and target ids between start and end token.

A source may also be an image, `[height, width]` or `[height, width, channels]`: its rows of pixels count as tokens.
"""

Batch = dict[str, np.ndarray]
"""`source [B, S]` and `target [B, T + 1]` int32, padded on the right, `source_length [B]` and `target_length [B]`.

Images keep their dtype, `source [B, height, width]`, and `source_length` is their height.

A row that only fills the batch has source length 0 and target length 1: no label counts.

Packed batches hold the arrays of `train.data.packing.pack` instead, `[B, S]` and `[B, T]`.
"""

log = logging.getLogger(__name__)

_SHORT = 64
"""Sources of fewer tokens are evaluated as if they had so many: one compilation for all of them."""
_TOKENS = 32_768
"""Of the texts that are evaluated or decoded together, at most."""
_PASSES = 10**9
"""Over the examples, more than any training makes: of endless ones grain cannot mix batches of one row."""
_EDGES = 256
"""Lengths at which buckets may begin and end, at most."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """How examples become batches."""

    tokens: int = 4096
    """Most tokens of source and target in a batch, padding counted."""
    max_length: int = 256
    """Training examples with more tokens on either side are left out, and counted."""
    buckets: int = 4
    """Most groups of examples of similar length, each with one static shape: one compilation a bucket.

    They are those that need least padding.
    """
    packed: bool = False
    """Several examples a row instead, of which none sees another, in rows of `max_length` tokens a side: least padding.

    Which examples share a row stays the same in all passes. For Transformers, and for language models.
    """

    def __post_init__(self) -> None:
        for name in ("tokens", "max_length", "buckets"):
            check_integer(f"batches.{name}", getattr(self, name), 1)


def examples(pairs: Any, tokenizer: Tokenizer) -> list[Example]:
    """The examples of a split (columns "source" and "target") as ids."""
    start, end = [tokenizer.start_id], [tokenizer.end_id]
    # Arrays take less memory than lists of numbers.
    sources = [np.array(ids + end, np.int32) for ids in tokenizer.encode_batch(pairs["source"])]
    targets = [np.array(start + ids + end, np.int32) for ids in tokenizer.encode_batch(pairs["target"])]
    return list(zip(sources, targets, strict=True))


def collate(rows: Sequence[Example], shape: tuple[int, int, int] | None = None, pad_id: int = 0) -> Batch:
    """One batch of `shape` (rows, source length, target length), by default that of the longest examples."""
    if shape is None:
        shape = (len(rows), max(len(source) for source, _ in rows), max(len(target) for _, target in rows))
    count, source_length, target_length = shape
    inner, dtype = _like(rows)
    batch = {
        "source": np.full((count, source_length, *inner), pad_id, dtype),
        "target": np.full((count, target_length), pad_id, np.int32),
        "source_length": np.zeros(count, np.int32),
        "target_length": np.ones(count, np.int32),
    }
    for index, (source, target) in enumerate(rows):
        batch["source"][index, : len(source)], batch["source_length"][index] = source, len(source)
        batch["target"][index, : len(target)], batch["target_length"][index] = target, len(target)
    return batch


def stream(
    config: Batches,
    rows: Sequence[Example],
    *,
    seed: int,
    multiple: int = 1,
    lengths: int = 1,
    part: tuple[int, int] = (0, 1),
) -> grain.MapDataset:
    """An endless sequence of training batches: `stream(...)[step]` is the batch of that step.

    A run that resumes at a step therefore sees exactly what it would have seen, and has no other state to save.
    Examples are shuffled anew in each pass over a bucket; buckets take turns in proportion to their batches.

    Args:
        config: how examples become batches.
        rows: the examples of the training split.
        seed: decides the order.
        multiple: the rows of a part of a batch are a multiple of this, the number of devices.
        lengths: lengths of source and target are multiples of this.
        part: which part of the rows of every batch is made here, of how many: that of one process.

    Raises:
        ValueError: no example is short enough, or a batch has no room for `multiple` rows a part.
    """
    short = [row for row in rows if max(len(row[0]), len(row[1])) <= config.max_length]
    if not short:
        raise ValueError(f"none of {len(rows)} training examples has at most max_length ({config.max_length}) tokens")
    if len(short) < len(rows):
        log.warning("left out %d of %d examples: over %d tokens", len(rows) - len(short), len(rows), config.max_length)
    if config.packed:
        return _stream_packed(config, short, seed=seed, multiple=multiple, lengths=lengths, part=part)
    parts, weights = [], []
    for index, bucket in enumerate(group_by_length(short, config.buckets, config.tokens)):
        longest = max(len(source) for source, _ in bucket), max(len(target) for _, target in bucket)
        shape = _shape(longest, config.tokens, multiple * part[1], lengths)
        mine = _part(shape[0], part)

        def batch(chosen: Sequence[Example], shape: tuple[int, int, int] = shape, mine: slice = mine) -> Batch:
            return collate(chosen[mine], (mine.stop - mine.start, *shape[1:]))

        order = grain.MapDataset.source(bucket).seed(seed + index).shuffle().repeat(_PASSES)
        parts.append(order.batch(shape[0], batch_fn=batch))
        weights.append(len(bucket) / shape[0])
    return grain.MapDataset.mix(parts, weights=weights)


def _stream_packed(
    config: Batches, rows: Sequence[Example], *, seed: int, multiple: int, lengths: int, part: tuple[int, int]
) -> grain.MapDataset:
    """`stream` of packed batches."""
    count, *room = _shape(capacities(rows, config.max_length), config.tokens, multiple * part[1], lengths)
    mine = _part(count, part)

    def batch(chosen: Sequence[Batch]) -> Batch:
        return {name: np.stack([row[name] for row in chosen[mine]]) for name in chosen[0]}

    order = grain.MapDataset.source(pack(rows, *room, seed=seed)).seed(seed).shuffle().repeat(_PASSES)
    return order.batch(count, batch_fn=batch)


def filled(batch: Batch) -> Batch:
    """The batch as if it had no padding."""
    full = {
        name: np.full_like(array, batch[name.removesuffix("_length")].shape[1])
        for name, array in batch.items()
        if name.endswith("_length")
    }
    return batch | full | {name: np.maximum(array, 1) for name, array in batch.items() if name.endswith("_segment")}


def iterate(batches: grain.MapDataset, *, start: int) -> Iterator[Batch]:
    """The batches from step `start` on, made ahead of time by a thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(batches.slice(slice(start, None)).to_iter_dataset(options))


def once(rows: Sequence[Example], *, size: int) -> Iterator[tuple[list[int], Batch]]:
    """Every example once, for evaluation: indices of the examples, and batches of at most `size` rows.

    Sources are padded to 64 tokens, 128, 256 and so on, or to the longest of all; targets to the longest of a group of
    such sources. A short batch is filled with empty rows, and one of long texts has fewer: a compilation for each
    length.
    """
    source = max((len(source) for source, _ in rows), default=0)
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        padded = min(source, max(_SHORT, 2 ** (len(row[0]) - 1).bit_length()))
        groups.setdefault(padded, []).append(index)
    for padded, group in sorted(groups.items()):
        target = max(len(rows[index][1]) for index in group)
        count = rows_of(padded + target, size)
        for first in range(0, len(group), count):
            chosen = group[first : first + count]
            yield chosen, collate([rows[index] for index in chosen], (count, padded, target))


def rows_of(length: int, most: int) -> int:
    """How many texts of a length are evaluated or decoded together: so many that they have 32,768 tokens, or `most`.

    >>> [rows_of(length, 64) for length in (16, 512, 1024, 40_000)]
    [64, 64, 32, 1]
    """
    return min(most, max(1, _TOKENS // max(1, length)))


def group_by_length(rows: Sequence[Example], count: int, tokens: int) -> list[list[Example]]:
    """Groups of similar length, the shortest examples first, at most `count` of them: those that need least padding.

    Sources and targets of a group are padded to its longest. Each group has as many examples as its batches of `tokens`
    tokens have rows, so that no batch holds one twice within a pass, unless all examples together are too few for that.
    """
    ordered = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    lengths = np.array([(len(source), len(target)) for source, target in ordered])
    # A group may begin wherever the length changes, at no more than so many places.
    edges = np.append(np.flatnonzero(np.diff(lengths.sum(axis=1), prepend=-1)), len(ordered))
    edges = edges[np.unique(np.linspace(0, len(edges) - 1, _EDGES).round().astype(int))]
    longest = np.maximum.reduceat(lengths, edges[:-1])
    # cost[i, j]: padded tokens of one group from edge i to edge j; not a group are those of too few examples.
    cost = np.full((len(edges), len(edges)), np.inf)
    for i in range(len(edges) - 1):
        padded = np.maximum(np.maximum.accumulate(longest[i:]).sum(axis=1), 1)  # a text may be empty, on both sides
        number = edges[i + 1 :] - edges[i]
        cost[i, i + 1 :] = np.where(number >= tokens // padded, number * padded, np.inf)
    # best[j]: the least cost of all examples before edge j in at most so many groups; cuts: where the last one begins.
    best, cuts = cost[0], []
    for _ in range(min(count, len(edges) - 1) - 1):
        total = best[:, None] + cost
        total[0] = cost[0]  # in one group
        cuts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    groups, end = [], len(edges) - 1
    for cut in reversed(cuts):
        groups.append(ordered[edges[cut[end]] : edges[end]])
        end = cut[end]
    groups.append(ordered[: edges[end]])
    return [group for group in reversed(groups) if group]


def _like(rows: Sequence[Example]) -> tuple[tuple[int, ...], Any]:
    """The shape of what stands at each place of a source, and its dtype: ids, or rows of pixels."""
    source = rows[0][0] if rows else []
    return (source.shape[1:], source.dtype) if isinstance(source, np.ndarray) else ((), np.int32)


def _shape(longest: tuple[int, int], tokens: int, multiple: int, lengths: int) -> tuple[int, int, int]:
    source, target = (-(-length // lengths) * lengths for length in longest)
    count = tokens // max(1, source + target) // multiple * multiple
    if count < 1:
        raise ValueError(
            f"batches.tokens ({tokens}) has no room for {multiple} rows of {source} and {target} tokens; "
            f"give at least {multiple * (source + target)}: a row for each device and each of the --pieces"
        )
    return count, source, target


def _part(rows: int, part: tuple[int, int]) -> slice:
    """The rows of a batch that a process has."""
    index, count = part
    return slice(index * rows // count, (index + 1) * rows // count)
