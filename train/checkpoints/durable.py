"""Atomic writes of files."""

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Writes a file atomically: after a kill or a power failure it has either the old or the new content.

    Raises:
        OSError: the file cannot be written.
    """
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
