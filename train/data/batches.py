"""From examples to batches of few static shapes, in an order that depends on the seed and the step only.

Each shape is compiled once, so there must be few of them; padding costs time, so texts of similar length share a batch.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from seqattn.checks import check_integer
from train.data.packing import capacities, pack
from train.data.tokenized import measure
from train.data.tokenizer import Tokenizer

Example = tuple[list[int] | np.ndarray, list[int] | np.ndarray]
"""A pair of source ids with the end token and target ids between start and end token.

A source may also be an image, `[height, width]` or `[height, width, channels]`. Its rows of pixels count as tokens.
"""

Batch = dict[str, np.ndarray]
"""Int32 arrays: `source [B, S]`, `target [B, T + 1]`, padded on the right, `source_length [B]`, `target_length [B]`.

Images keep their dtype, as `source [B, height, width]`; `source_length` is their height.

A row that only fills the batch has source length 0 and target length 1, so it has no label.

Packed batches contain the arrays of `train.data.packing.pack` instead, `[B, S]` and `[B, T]`.
"""

log = logging.getLogger(__name__)

_SHORT = 64
"""Minimum padded length of sources in evaluation, so that all short sources share one compilation."""
_TOKENS = 32_768
"""Maximum number of tokens that are evaluated or decoded together."""
_PASSES = 10**9
"""Passes over the examples, more than any training makes. grain cannot mix endless datasets of batches of one row."""
_EDGES = 256
"""Maximum number of lengths at which buckets may begin and end, which bounds the table of `group_by_length`."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Settings of training batches."""

    tokens: int = 4096
    """Maximum number of source and target tokens in a batch, including padding."""
    max_length: int = 256
    """Maximum number of tokens on each side of a training example; longer examples are left out, with a warning."""
    buckets: int = 4
    """Maximum number of buckets of examples of similar length. Each bucket has one static shape and is compiled once.

    The buckets are chosen to minimize padding.
    """
    packed: bool = False
    """If True, pack several examples into each row of `max_length` tokens per side, which leaves the least padding.

    There are no buckets then. Examples of a row do not attend to each other, and share a row in all passes. Only for
    Transformers and Transformer language models.
    """

    def __post_init__(self) -> None:
        for name in ("tokens", "max_length", "buckets"):
            check_integer(f"batches.{name}", getattr(self, name), 1)


def examples(pairs: Any, tokenizer: Tokenizer) -> list[Example]:
    """Encodes the examples of a split with the columns "source" and "target"."""
    # Arrays need less memory than lists of numbers. [:] gives a whole column: one by one, texts take as long to read as
    # to encode.
    sources = [np.array(ids, np.int32) for ids in tokenizer.sources(pairs["source"][:])]
    targets = [np.array(ids, np.int32) for ids in tokenizer.targets(pairs["target"][:])]
    return list(zip(sources, targets, strict=True))


def collate(rows: Sequence[Example], shape: tuple[int, int, int] | None = None, pad_id: int = 0) -> Batch:
    """Pads examples to one batch.

    Args:
        rows: the examples.
        shape: rows, source length and target length; by default those of the longest examples.
        pad_id: id of the padding token.
    """
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
    """Makes an endless sequence of training batches: `stream(...)[step]` is the batch of that step.

    A batch depends on the arguments and the step only. A run that resumes at a step therefore sees the same batches as
    a run without a pause, and checkpoints need no state of the data. Each pass over a bucket has its own order.
    Buckets alternate in proportion to their number of batches.

    Args:
        config: settings of the batches.
        rows: the examples of the training split.
        seed: decides the order.
        multiple: the number of rows per part is a multiple of this, the number of devices of a process.
        lengths: source and target lengths are multiples of this.
        part: index of this process and number of processes; each makes its part of the rows of every batch.

    Returns:
        A sequence of batches, indexed by the step.

    Raises:
        ValueError: no example is short enough, or a batch has no room for `multiple` rows per part.
    """
    lengths_of = measure(rows)
    # Two columns, not a reduction over them: with millions of examples that alone would take seconds.
    short = np.flatnonzero(np.maximum(lengths_of[:, 0], lengths_of[:, 1]) <= config.max_length)
    short = short.astype(np.int32 if len(rows) < 2**31 else np.int64)  # half of the memory of a bucket
    if not len(short):
        raise ValueError(f"all {len(rows)} training examples are longer than max_length ({config.max_length}) tokens")
    if len(short) < len(rows):
        log.warning(
            "left out %d of %d examples: longer than %d tokens", len(rows) - len(short), len(rows), config.max_length
        )
    sizes = {"multiple": multiple * part[1], "lengths": lengths}
    if config.packed:
        return _stream_packed(config, rows, short, lengths_of[short], seed=seed, part=part, **sizes)
    parts, weights = [], []
    for index, group in enumerate(group_by_length(lengths_of.take(short, axis=0), config.buckets, config.tokens)):
        bucket = short.take(group)
        source, target = (int(lengths_of[:, side].take(bucket).max()) for side in (0, 1))
        shape = _shape((source, target), config.tokens, **sizes)
        mine = _part(shape[0], part)

        # The default arguments bind the values of this bucket, as the function is called after the loop.
        def batch(chosen: Sequence[int], shape: tuple[int, int, int] = shape, mine: slice = mine) -> Batch:
            return collate([rows[row] for row in chosen[mine]], (mine.stop - mine.start, *shape[1:]))

        parts.append(_shuffled(bucket, seed + index).batch(shape[0], batch_fn=batch))
        weights.append(len(bucket) / shape[0])
    return grain.MapDataset.mix(parts, weights=weights)


def _stream_packed(
    config: Batches,
    rows: Sequence[Example],
    short: np.ndarray,
    lengths_of: np.ndarray,
    *,
    seed: int,
    multiple: int,
    lengths: int,
    part: tuple[int, int],
) -> grain.MapDataset:
    """Makes the sequence of `stream` from packed rows of the examples `short` with these lengths."""
    count, *room = _shape(capacities(lengths_of, config.max_length), config.tokens, multiple, lengths)
    mine = _part(count, part)
    # Rows are planned once, before shuffling. Packing anew in each pass would need state that grows with the step.
    packed = pack(rows, *room, seed=seed, chosen=short)

    def batch(chosen: Sequence[int]) -> Batch:
        made = [packed[row] for row in chosen[mine]]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    return _shuffled(range(len(packed)), seed).batch(count, batch_fn=batch)


def _shuffled(rows: Sequence[int] | np.ndarray, seed: int) -> grain.MapDataset:
    """Makes an endless sequence of row numbers, each pass in its own order.

    Only numbers are shuffled, so that a process reads no rows but those of its own part.
    """
    # Shuffle before repeat: grain then reseeds each pass and still computes the element of any step directly.
    return grain.MapDataset.source(rows).seed(seed).shuffle().repeat(_PASSES)


def filled(batch: Batch) -> Batch:
    """Returns the batch with all padding counted as tokens, to measure the cost of its shape."""
    full = {
        name: np.full_like(array, batch[name.removesuffix("_length")].shape[1])
        for name, array in batch.items()
        if name.endswith("_length")
    }
    return batch | full | {name: np.maximum(array, 1) for name, array in batch.items() if name.endswith("_segment")}


def iterate(batches: grain.MapDataset, *, start: int) -> Iterator[Batch]:
    """Iterates over the batches from step `start` on; a thread makes them ahead of time."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(batches.slice(slice(start, None)).to_iter_dataset(options))


def once(rows: Sequence[Example], *, size: int, multiple: int = 1) -> Iterator[tuple[list[int], Batch]]:
    """Iterates over every example once, for evaluation.

    Sources are padded to 64, 128, 256, ... tokens, or to the longest source, and targets to the longest target of such
    a group. Each group has one shape and is compiled once: its last batch is filled with empty rows. Batches of long
    texts have fewer rows (see `rows_of`).

    Args:
        rows: the examples.
        size: maximum number of rows per batch.
        multiple: the number of rows is rounded up to a multiple of this.

    Yields:
        The indices of the examples of a batch, and the batch.
    """
    source = max((len(source) for source, _ in rows), default=0)
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        padded = min(source, max(_SHORT, 2 ** (len(row[0]) - 1).bit_length()))
        groups.setdefault(padded, []).append(index)
    for padded, group in sorted(groups.items()):
        target = max(len(rows[index][1]) for index in group)
        count = rows_of(padded + target, size, multiple)
        for first in range(0, len(group), count):
            chosen = group[first : first + count]
            yield chosen, collate([rows[index] for index in chosen], (count, padded, target))


def rows_of(length: int, most: int, multiple: int = 1) -> int:
    """Returns how many texts of a length are evaluated or decoded together: at most 32,768 tokens, and at most `most`.

    The number is rounded up to a multiple of `multiple`, which devices share.

    >>> [rows_of(length, 64) for length in (16, 512, 1024, 40_000)]
    [64, 64, 32, 1]
    >>> rows_of(40_000, 64, multiple=8)
    8
    """
    count = min(most, max(1, _TOKENS // max(1, length)))
    return -(-count // multiple) * multiple


def group_by_length(lengths: np.ndarray, count: int, tokens: int) -> list[np.ndarray]:
    """Divides examples into at most `count` groups of similar length such that padding is minimal; shortest first.

    Sources and targets of a group are padded to the longest of the group. A group has at least as many examples as one
    of its batches has rows, so that no batch contains an example twice in a pass. The only exception is a single group
    of all examples, if these are too few.

    Groups are consecutive in the order of source plus target length. Dynamic programming over their edges finds the
    best ones.

    Args:
        lengths: number of source and target tokens of each of n examples, `[n, 2]`, as from `measure`.
        count: maximum number of groups.
        tokens: maximum number of tokens of a batch, including padding.

    Returns:
        The numbers of the examples of each group.

    >>> [group.tolist() for group in group_by_length(np.array([[2, 2], [9, 9], [3, 2], [9, 8]]), 2, 10)]
    [[0, 2], [3, 1]]
    """
    total = lengths[:, 0] + lengths[:, 1]
    # Numbers of 16 bits are sorted in linear time.
    ordered = np.argsort(total.astype(np.uint16) if total.max() < 2**16 else total, kind="stable")
    lengths, total = lengths.take(ordered, axis=0), total.take(ordered)
    # Groups begin only where the length changes, and at no more than _EDGES places: the table below is quadratic.
    edges = np.concatenate([[0], np.flatnonzero(total[1:] != total[:-1]) + 1, [len(ordered)]])
    edges = edges[np.unique(np.linspace(0, len(edges) - 1, _EDGES).round().astype(int))]
    longest = np.maximum.reduceat(lengths, edges[:-1])
    # cost[i, j]: padded tokens of one group from edge i to edge j; infinite if the group has too few examples.
    cost = np.full((len(edges), len(edges)), np.inf)
    for i in range(len(edges) - 1):
        padded = np.maximum(np.maximum.accumulate(longest[i:]).sum(axis=1), 1)  # both sides of an example may be empty
        number = edges[i + 1 :] - edges[i]
        cost[i, i + 1 :] = np.where(number >= tokens // padded, number * padded, np.inf)
    # best[j]: the least cost of the examples before edge j in at most as many groups as there were rounds.
    # cuts[round][j]: the edge where the last of these groups begins; the groups are read from it backwards.
    best, cuts = cost[0], []
    for _ in range(min(count, len(edges) - 1) - 1):
        total = best[:, None] + cost
        total[0] = cost[0]  # all examples in one group, which is always possible
        cuts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    groups: list[np.ndarray] = []
    end = len(edges) - 1
    for cut in reversed(cuts):
        groups.append(ordered[edges[cut[end]] : edges[end]])
        end = cut[end]
    groups.append(ordered[: edges[end]])
    return [group for group in reversed(groups) if len(group)]


def _like(rows: Sequence[Example]) -> tuple[tuple[int, ...], Any]:
    """Returns the shape and dtype of one element of a source, which is an id or a row of pixels."""
    source = rows[0][0] if rows else []
    return (source.shape[1:], source.dtype) if isinstance(source, np.ndarray) else ((), np.int32)


def _shape(longest: tuple[int, int], tokens: int, multiple: int, lengths: int) -> tuple[int, int, int]:
    source, target = (-(-length // lengths) * lengths for length in longest)
    count = tokens // max(1, source + target) // multiple * multiple
    if count < 1:
        raise ValueError(
            f"batches.tokens ({tokens}) has no room for {multiple} rows of {source} and {target} tokens; "
            f"give at least {multiple * (source + target)}: each device needs a row for each of the --pieces"
        )
    return count, source, target


def _part(rows: int, part: tuple[int, int]) -> slice:
    """Returns the rows of a batch that belong to a process."""
    index, count = part
    return slice(index * rows // count, (index + 1) * rows // count)
