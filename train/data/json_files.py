"""JSON files that others wrote: one object or list each, not too large and not nested too deeply."""

import json
from pathlib import Path
from typing import Any

LARGEST = 2**26
"""Maximum size of a JSON file in bytes."""


def read_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is too large, is no JSON in UTF-8, or holds no object. The message names the file.
    """
    found: dict[str, Any] = _read(path, dict, "object")
    return found


def read_list(path: Path) -> list[Any]:
    """Reads a file that holds a JSON list.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is too large, is no JSON in UTF-8, or holds no list. The message names the file.
    """
    found: list[Any] = _read(path, list, "list")
    return found


def _read(path: Path, kind: type, name: str) -> Any:
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} must have at most {LARGEST:,} bytes, got {path.stat().st_size:,}")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path} must hold a JSON {name}, got a {type(found).__name__}")
    return found
