"""Parallel text: two files, plain or gzip, whose lines of the same number translate each other."""

import gzip
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Iterator
from pathlib import Path

from train.tasks.task import Pair

_UTF16, _UTF32 = (
    f"{name} by its byte order mark, not UTF-8: convert it with iconv -f {name} -t UTF-8"
    for name in ("UTF-16", "UTF-32")
)
_NO_TEXT = (
    (b"\x1f\x8b", "gzip data, not text: end the name of the file in .gz, or decompress it"),
    *((mark, _UTF32) for mark in (BOM_UTF32_LE, BOM_UTF32_BE)),  # before those of UTF-16, of which one begins alike
    *((mark, _UTF16) for mark in (BOM_UTF16_LE, BOM_UTF16_BE)),
)
"""How files begin that hold something else than UTF-8, and what to do about it."""


def read_pairs(source: Path, target: Path) -> list[Pair]:
    """The lines of two files side by side.

    Raises ValueError as `read_lines` does, and where one file has more lines than the other, naming both counts and
    the first line that has no partner.
    """
    sources, targets = list(read_lines(source)), list(read_lines(target))
    if len(sources) != len(targets):
        first = min(len(sources), len(targets))
        path, line = (source, sources[first]) if len(sources) > first else (target, targets[first])
        raise ValueError(
            f"{source} has {len(sources)} lines and {target} has {len(targets)}: "
            f"{path}:{first + 1} has no partner: {line[:60]!r}"
        )
    return list(zip(sources, targets, strict=True))


def read_lines(path: Path) -> Iterator[str]:
    r"""The lines of a UTF-8 text, read as gzip where the name ends in ".gz".

    Only "\n" ends a line: "\x0b", U+0085, U+2028 and a lone "\r" are characters like any other. A byte order mark at
    the start of the file and one "\r" at the end of a line are no part of the text; the last line may lack its "\n".

    Raises ValueError, naming file and line, where a line is not UTF-8 or holds a NUL, or the gzip data are damaged; and
    where the file is UTF-16 or UTF-32 by its byte order mark, or gzip data without ".gz".
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):  # binary, because a text file has more ends of lines
                yield decoded(line, f"{path}:{number}", number)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}:{number + 1}: damaged gzip data: {error}") from error


def decoded(line: bytes, where: str, number: int) -> str:
    r"""The text of a line, without its end and, where it is the first, without a byte order mark.

    Args:
        line: as it stands in the file.
        where: names the line in errors.
        number: of the line, from 1.

    Raises:
        ValueError: naming the place, where the line is not UTF-8 or holds a NUL, or the first one begins as gzip data,
            UTF-16 or UTF-32 do.

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
        raise ValueError(f"{where}: NUL is no character of a text; is this UTF-16?")
    return text
