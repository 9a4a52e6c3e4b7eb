"""Lines of standard input, available as soon as they arrive."""

import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from typing import cast

from train.tasks.lines import decoded

_BYTES_READ = 1 << 16
_PATIENCE = 0.05
"""Seconds to wait for more lines before the available ones are returned."""


def standard_input() -> io.BufferedIOBase:
    """Returns standard input as a binary stream."""
    return cast(io.BufferedIOBase, sys.stdin.buffer)


def lines_as_they_come(stream: io.BufferedIOBase, count: int) -> Iterator[list[str]]:
    """Yields lists of the lines of a UTF-8 stream, without line ends.

    A list has all lines that are available, about `count` at most. A file therefore gives large lists; a pipe or a
    terminal gives each line without waiting for the next one. Lines are decoded and refused as in
    `train.tasks.lines`; a byte order mark at the start is removed.

    Raises:
        ValueError: a line is not UTF-8 or contains NUL.
    """
    ready: list[bytes] = []
    number, unfinished = 1, b""
    while piece := stream.read1(_BYTES_READ):
        *finished, unfinished = (unfinished + piece).split(b"\n")
        ready += finished
        if len(ready) >= count or (ready and not _has_more(stream)):
            yield _texts(ready, number)
            number, ready = number + len(ready), []
    ready += [unfinished] if unfinished else []
    if ready:
        yield _texts(ready, number)


def lines_left(stream: io.BufferedIOBase) -> int | None:
    """Counts the lines from here to the end of a file; None if the stream is not a regular file."""
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return None
    here = stream.tell()
    count = sum(1 for _ in stream)
    stream.seek(here)
    return count


def _texts(lines: list[bytes], first: int) -> list[str]:
    return [decoded(line, f"line {number} of standard input", number) for number, line in enumerate(lines, first)]


def _has_more(stream: io.BufferedIOBase) -> bool:
    """Whether a stream can be read without waiting. True if the stream cannot tell."""
    try:
        return bool(select.select([stream], [], [], _PATIENCE)[0])
    except (OSError, ValueError):
        return True
