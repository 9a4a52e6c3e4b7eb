"""Token ids of a training split in Arrow files, written once and memory-mapped afterwards.

Each file, a shard, has the ids of 100,000 examples or more. Several processes may write shards of the same folder side
by side, and an interrupted process goes on at the first missing shard.
"""

import bisect
import hashlib
import itertools
import logging
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from train.checkpoints.disk_space import check_room
from train.data.cache_folder import CacheFolder

log = logging.getLogger(__name__)

Ids = tuple[np.ndarray, np.ndarray]
"""Source and target ids of an example, int32."""

SHARD = 100_000
"""Minimum number of examples of each shard but the last."""
SHARDS = 500
"""Maximum number of shards: each keeps a file open, and many systems allow a process 1,024 of them."""
_NAME = re.compile(r"(\d{5})-([0-9a-f]{16})\.arrow")
"""The name of a shard: its number, and the start of the SHA-256 of its content."""
_TOGETHER = 10_000
"""Number of examples that are tokenized at a time, and written as one record batch."""
_KEPT = 250
"""Number of examples that are read before the pages of all shards are given back: up to 64 MB, as the system maps 16
pages around each of the four that an example needs."""


class Tokenized(Sequence[Ids]):
    """The examples of memory-mapped shards.

    The system reads pages of tokens when they are needed. After every 250 examples the pages are given back, so that
    those that were read do not pile up in the memory of the process; they stay in the page cache.

    Args:
        files: the shards, in order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._reads = 0
        self._maps = [_map(file) for file in files]
        self._pieces = [piece for mapped in self._maps for piece in _pieces(mapped)]
        # The number of examples before each piece, and of all of them.
        self._before = [0, *itertools.accumulate(len(piece[0][0]) - 1 for piece in self._pieces)]

    def measure(self) -> np.ndarray:
        """Returns the number of source and target tokens of each example, int32 `[n, 2]`, without reading tokens."""
        found = np.empty((len(self), 2), np.int32)
        for piece, first, last in zip(self._pieces, self._before, self._before[1:], strict=False):
            for side, (starts, _) in enumerate(piece):
                np.subtract(starts[1:], starts[:-1], out=found[first:last, side])
        self._give_back()
        return found

    def __len__(self) -> int:
        return self._before[-1]

    @overload
    def __getitem__(self, index: int) -> Ids: ...
    @overload
    def __getitem__(self, index: slice) -> list[Ids]: ...
    def __getitem__(self, index: int | slice) -> Ids | list[Ids]:
        """Reads an example, or several."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number = bisect.bisect_right(self._before, index) - 1
        row = index - self._before[number]
        source, target = (ids[starts[row] : starts[row + 1]].astype(np.int32) for starts, ids in self._pieces[number])
        self._reads += 1
        if self._reads % _KEPT == 0:
            self._give_back()
        return source, target

    def _give_back(self) -> None:
        # Another thread that reads meanwhile only faults its page in again.
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


def measure(rows: Sequence[tuple[Any, Any]]) -> np.ndarray:
    """Returns the number of source and target tokens of each example, `[len(rows), 2]`.

    >>> measure([([5, 2], [1, 7, 2]), ([], [1, 2])]).tolist()
    [[2, 3], [0, 2]]
    """
    if isinstance(rows, Tokenized):  # stored beside the tokens, so no example is read
        return rows.measure()
    return np.array([(len(source), len(target)) for source, target in rows], np.int64).reshape(len(rows), 2)


@dataclass(frozen=True)
class Split:
    """A split to tokenize.

    Attributes:
        examples: number of examples.
        encode: returns the ids of the examples from a first one up to, and without, a last one.
        vocab_size: number of different ids. Up to 65,536 of them need two bytes each.
        shard: number of examples of each shard but the last.
    """

    examples: int
    encode: Callable[[int, int], Sequence[tuple[Any, Any]]]
    vocab_size: int
    shard: int

    @property
    def dtype(self) -> Any:
        """The dtype of stored ids."""
        return np.uint16 if self.vocab_size <= 2**16 else np.int32


def shard_size(examples: int) -> int:
    """Returns the number of examples of each shard but the last, for a split of so many.

    >>> shard_size(10_000_000), shard_size(1_000_000_000)
    (100000, 2000000)
    """
    return max(SHARD, -(-examples // SHARDS))


def read(folder: CacheFolder, examples: int) -> Tokenized:
    """Maps the shards of a folder that is whole.

    Args:
        folder: the folder.
        examples: the number of examples that it has.

    Raises:
        ValueError: a shard is missing, because another process removed it since.
    """
    found = Tokenized([file for _, file in sorted(_shards(folder).items())])
    if len(found) != examples:
        raise ValueError(f"{folder.path} has {len(found)} of {examples} examples, as files were removed; run it again")
    return found


def write(folder: CacheFolder, split: Split, show: Callable[[int], None] = lambda done: None) -> None:
    """Tokenizes a split into the shards of a folder, together with other processes that do the same.

    Shards that are there already are kept if their digest is right. A shard belongs to the process that holds its lock.
    If that process dies, another one takes the shard over.

    Args:
        folder: the folder, which has begun.
        split: the split.
        show: called with the number of examples that are done.

    Raises:
        OSError: a shard cannot be written, such as on a full disk. Shards that are whole stay.
    """
    _drop_damaged(folder)
    numbers = range(-(-split.examples // split.shard))
    checked = False
    while missing := _missing(folder, numbers):
        if not checked:
            _check_room(folder, split, len(missing) * split.shard)
            checked = True
        for number in missing:
            with folder.claim(f"{number:05}", wait=False) as mine:
                if mine and number not in _shards(folder):
                    _write_shard(folder, split, number, show)
        # Other processes are writing the rest. When the first one is released, it is done, or its process is dead.
        if left := _missing(folder, missing):
            with folder.claim(f"{left[0]:05}"):
                pass
    show(split.examples)


def _write_shard(folder: CacheFolder, split: Split, number: int, show: Callable[[int], None]) -> None:
    first = number * split.shard
    last = min(first + split.shard, split.examples)
    before = len(_shards(folder)) * split.shard
    fresh = folder.work / f"{number:05}.new"
    try:
        with pa.OSFile(str(fresh), "wb") as file, pa.ipc.new_file(file, _schema(split.dtype)) as writer:
            # In pieces, since Python's numbers take twenty times the memory of the ids.
            for start in range(first, last, _TOGETHER):
                rows = split.encode(start, min(start + _TOGETHER, last))
                writer.write_batch(_batch(rows, split.dtype))
                show(min(before + start + len(rows) - first, split.examples))
        folder.add(fresh, f"{number:05}-{_digest(fresh)}.arrow")
    finally:
        fresh.unlink(missing_ok=True)  # half of a shard would fill the disk


def _schema(dtype: Any) -> pa.Schema:
    ids = pa.list_(pa.from_numpy_dtype(dtype))
    return pa.schema({"source": ids, "target": ids})


def _batch(rows: Sequence[tuple[Any, Any]], dtype: Any) -> pa.RecordBatch:
    return pa.record_batch([_lists(several, dtype) for several in zip(*rows, strict=True)], _schema(dtype))


def _lists(several: Sequence[Any], dtype: Any) -> pa.ListArray:
    # Converted by Arrow: NumPy would wrap ends beyond 2^31 ids without an error.
    ends = pa.array(np.cumsum([0, *map(len, several)]), pa.int32())
    return pa.ListArray.from_arrays(ends, pa.array(np.concatenate([np.asarray(ids, dtype) for ids in several])))


def _check_room(folder: CacheFolder, split: Split, examples: int) -> None:
    """Warns if the disk lacks room for the shards, by the sizes of the first examples."""
    sample = split.encode(0, min(1000, split.examples))
    ids = sum(len(source) + len(target) for source, target in sample) / len(sample)
    size = round(examples * (ids * np.dtype(split.dtype).itemsize + 2 * np.dtype(np.int32).itemsize))
    check_room(folder.path, size, "the tokens of the training split", "give another folder with --data-cache.folder")


def _drop_damaged(folder: CacheFolder) -> None:
    """Removes shards of an interrupted process whose content does not have the digest in their name."""
    for number, file in sorted(_shards(folder).items()):
        if _digest(file) != file.stem.partition("-")[2]:
            # The lock: another process may have seen the same, and have written the shard again.
            with folder.claim(f"{number:05}"):
                if file.exists() and _digest(file) != file.stem.partition("-")[2]:
                    log.warning("%s: its content changed after it was written; it is made anew", file)
                    file.unlink()


def _missing(folder: CacheFolder, numbers: Iterable[int]) -> list[int]:
    there = _shards(folder)
    return [number for number in numbers if number not in there]


def _shards(folder: CacheFolder) -> dict[int, Path]:
    names = ((_NAME.fullmatch(path.name), path) for path in folder.path.iterdir())
    return {int(match[1]): path for match, path in names if match}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as content:
        return mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)


def _pieces(mapped: mmap.mmap) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Yields the starts and the ids of both columns of each record batch, as views of the mapped file."""
    reader = pa.ipc.open_file(pa.py_buffer(mapped))
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        columns: Iterator[Any] = (batch.column(side) for side in ("source", "target"))
        yield [(column.offsets.to_numpy(), column.values.to_numpy()) for column in columns]
