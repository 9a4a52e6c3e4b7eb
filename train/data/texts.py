"""Pairs of texts in an Arrow file that is written and read piece by piece, so that it may be larger than memory."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

PIECE = 10_000
"""Number of pairs that are in memory at a time."""
_SCHEMA = pa.schema({"source": pa.string(), "target": pa.string()})


def write_texts(pairs: Iterable[tuple[str, str]], file: Path) -> int:
    """Writes pairs (source, target) to a file, and returns their number.

    Raises:
        OSError: the file cannot be written.
    """
    rest, count = iter(pairs), 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        while some := list(islice(rest, PIECE)):
            source, target = zip(*some, strict=True)
            writer.write_batch(pa.record_batch([pa.array(source, pa.string()), pa.array(target, pa.string())], _SCHEMA))
            count += len(some)
    return count


class Texts:
    """The pairs of a file that `write_texts` wrote, with the columns "source" and "target".

    The file is read and not memory-mapped: the pages of a mapped file count as memory of the process.

    Args:
        file: the file, which must not change while it is used.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "texts.arrow")
    ...     write_texts([("a", "b"), ("c", "d"), ("e", "f")], file)
    ...     texts = Texts(file)
    ...     len(texts), list(texts["target"]), texts.piece(1, 3)["source"][:]
    3
    (3, ['b', 'd', 'f'], ['c', 'e'])
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        with self._open() as source:
            reader = pa.ipc.open_file(source)
            self._batches = reader.num_record_batches
            last = reader.get_batch(self._batches - 1).num_rows if self._batches else 0
        self._count = max(0, self._batches - 1) * PIECE + last

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, column: str) -> Iterator[str]:
        """Yields the texts of a column."""
        for piece in self.pieces():
            yield from piece[column][:]

    def pieces(self) -> Iterator[Dataset]:
        """Yields all pairs, 10,000 at a time."""
        for first in range(0, self._count, PIECE):
            yield self.piece(first, min(first + PIECE, self._count))

    def piece(self, first: int, last: int) -> Dataset:
        """Reads the pairs from `first` up to, and without, `last`."""
        numbers = range(first // PIECE, -(-last // PIECE))
        with self._open() as source:
            reader = pa.ipc.open_file(source)
            table = pa.Table.from_batches([reader.get_batch(number) for number in numbers], _SCHEMA)
        return Dataset(table.slice(first - numbers.start * PIECE, last - first))

    def _open(self) -> pa.NativeFile:
        return pa.OSFile(str(self._file), "rb")
