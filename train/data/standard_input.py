"""Texts of standard input: its lines as they come."""

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
"""Seconds to wait for more lines before those that are there are given."""


def standard_input() -> io.BufferedIOBase:
    """The bytes of standard input."""
    return cast(io.BufferedIOBase, sys.stdin.buffer)


def lines_as_they_come(stream: io.BufferedIOBase, count: int) -> Iterator[list[str]]:
    """The lines of a stream of UTF-8, without their ends: all that are there, and then again; about `count` at most.

    A file gives large chunks, and a pipe or a terminal each line without waiting for the next one. What a line is, and
    which are refused, is as in files (`train.tasks.lines`): a byte order mark at the start is no part of the text.

    Raises:
        ValueError: a line is not UTF-8, or holds a NUL.
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
    """Lines from here to the end of a file; None of what cannot be read twice."""
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return None
    here = stream.tell()
    count = sum(1 for _ in stream)
    stream.seek(here)
    return count


def _texts(lines: list[bytes], first: int) -> list[str]:
    return [decoded(line, f"line {number} of standard input", number) for number, line in enumerate(lines, first)]


def _has_more(stream: io.BufferedIOBase) -> bool:
    """Whether a stream can be read at once; so it is said of what cannot tell."""
    try:
        return bool(select.select([stream], [], [], _PATIENCE)[0])
    except (OSError, ValueError):
        return True
