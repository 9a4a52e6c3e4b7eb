"""Files that a kill leaves whole."""

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Writes a file such that a kill, or a machine without power, leaves either the old or the new one."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
