"""Lines of text files, plain or gzip, and pairs of lines from two parallel files."""

import gzip
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from train.tasks.task import Pair

_UTF16, _UTF32 = (
    f"{name} by its byte order mark, not UTF-8: convert it with iconv -f {name} -t UTF-8"
    for name in ("UTF-16", "UTF-32")
)
_NO_TEXT = (
    (b"\x1f\x8b", "gzip data, not text: rename the file to end in .gz, or decompress it"),
    *((mark, _UTF32) for mark in (BOM_UTF32_LE, BOM_UTF32_BE)),  # first, as the mark of UTF-32-LE starts with UTF-16's
    *((mark, _UTF16) for mark in (BOM_UTF16_LE, BOM_UTF16_BE)),
)
"""First bytes of files that are not UTF-8, each with the error message."""


@dataclass(frozen=True)
class ParallelLines:
    """The pairs (source line, target line) of two parallel files, which are read anew by each iteration.

    Raises:
        ValueError: as `read_lines`; or one file has more lines than the other, and the message names both counts and
            the first line without a partner.

    Attributes:
        source: the file in the source language.
        target: the file in the target language.
    """

    source: Path
    target: Path

    def __iter__(self) -> Iterator[Pair]:
        sources, targets = read_lines(self.source), read_lines(self.target)
        for number, (source, target) in enumerate(zip_longest(sources, targets), start=1):
            if source is None or target is None:
                # One file has ended. The message also has the number of lines of the other one.
                longer, lines = (self.target, targets) if source is None else (self.source, sources)
                more, less = number + sum(1 for _ in lines), number - 1
                counts = (less, more) if source is None else (more, less)
                raise ValueError(
                    f"{self.source} has {counts[0]} lines and {self.target} has {counts[1]}: "
                    f"{longer}:{number} has no partner: {(source or target or '')[:60]!r}"
                )
            yield source, target


def read_lines(path: Path) -> Iterator[str]:
    r"""Yields the lines of a UTF-8 file, which is read as gzip if its name ends in ".gz".

    Only "\n" ends a line: "\x0b", U+0085, U+2028 and a lone "\r" are ordinary characters. A byte order mark at the
    start of the file and one "\r" at the end of a line are removed. The last line may lack its "\n".

    Raises:
        ValueError: a line is not UTF-8 or contains NUL, the gzip data are damaged, the file starts with the byte order
            mark of UTF-16 or UTF-32, or it is gzip data without ".gz" in its name. The message names file and line.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):  # binary: text mode would also split at a lone "\r"
                yield decoded(line, f"{path}:{number}", number)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}:{number + 1}: damaged gzip data: {error}") from error


def decoded(line: bytes, where: str, number: int) -> str:
    r"""Decodes a line of UTF-8, without its line end and, on line 1, without a byte order mark.

    Args:
        line: the bytes of the line.
        where: name of the line for error messages.
        number: line number, counted from 1.

    Raises:
        ValueError: the line is not UTF-8 or contains NUL, or line 1 starts like gzip data, UTF-16 or UTF-32. The
            message starts with `where`.

    >>> decoded(b"\xef\xbb\xbfein Haus\r\n", "line 1 of standard input", 1)
    'ein Haus'
    """
    if number == 1:
        for mark, what in _NO_TEXT:
            if line.startswith(mark):
                raise ValueError(f"{where}: {what}")
        line = line.removeprefix(BOM_UTF8)
    try:
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        byte, column = error.object[error.start], error.start + 1
        raise ValueError(f"{where}: byte {column} (0x{byte:02x}) is not UTF-8: {error.reason}") from error
    if "\0" in text:
        raise ValueError(f"{where}: the line contains NUL, which is not allowed in text; is this UTF-16?")
    return text
