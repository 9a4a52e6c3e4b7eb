"""A digest of every file of a folder, so that what was written is known again.

`write` puts a manifest, `digests.json`, beside the files:

    {"files": {"state/d/ab12": {"sha256": "9f86d0...", "size": 1234}, ...}, "version": 1}

Paths are relative to the folder. The manifest is on disk as a whole or not at all, and after all files that it names.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "digests.json"
_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write(folder: Path) -> None:
    """Writes the manifest of all files that are in a folder, and those below it.

    Raises:
        ValueError: the folder holds something that is neither a file nor a folder, such as a symbolic link.
        OSError: a file cannot be read, or the manifest not written.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {}
    for name, entry in _entries(folder):
        if not entry.is_file(follow_symlinks=False):
            raise ValueError(f"{folder / name} {_kind(entry)}")
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())  # no manifest names a file that a power failure can still take
        files[name] = {"sha256": _sha256(folder / name), "size": entry.stat(follow_symlinks=False).st_size}
    for below in {(folder / name).parent for name in files}:
        flush(below)
    fresh = folder / f".{MANIFEST}"
    with fresh.open("wb") as file:
        file.write(_content(files))
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(folder / MANIFEST)
    flush(folder)


def damage(folder: Path) -> str | None:
    """The first thing that is wrong with a folder: the file and what it is; None where all is as it was written.

    Whatever is there, nothing outside of the folder is read. Sizes are compared before any file is.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder of its own"
    try:
        files = _read(folder / MANIFEST)
        found = dict(_entries(folder))
        found.pop(MANIFEST, None)
        wrong = _strange(found, files)
        if wrong is None:
            wrong = next((name for name in sorted(files) if _sha256(folder / name) != files[name]["sha256"]), None)
            wrong = None if wrong is None else f"{wrong}: its bytes are not those that were written"
    except (OSError, ValueError) as error:
        return str(error)
    return wrong


def flush(folder: Path) -> None:
    """Makes what was renamed in a folder outlast a power failure, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _strange(found: dict[str, os.DirEntry[str]], files: dict[str, Any]) -> str | None:
    for name, entry in sorted(found.items()):
        if not entry.is_file(follow_symlinks=False):
            return f"{name} {_kind(entry)}"
    for name in sorted({*found, *files}):
        if name not in found:
            return f"{name} is missing"
        if name not in files:
            return f"{name} was not there when it was written"
        size, wanted = found[name].stat(follow_symlinks=False).st_size, files[name]["size"]
        if size != wanted:
            return f"{name} has {size} bytes, and was written with {wanted}"
    return None


def _entries(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """What is in a folder and below it, but for the folders themselves; symbolic links are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(folder / entry.name, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry


def _kind(entry: os.DirEntry[str]) -> str:
    return "is a symbolic link" if entry.is_symlink() else "is neither a file nor a folder"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(files: dict[str, Any]) -> bytes:
    return json.dumps({"version": _VERSION, "files": files}, indent=1, sort_keys=True).encode() + b"\n"


def _read(manifest: Path) -> dict[str, Any]:
    """The files of a manifest.

    Raises:
        ValueError: it is not there, or not byte for byte as `write` writes it.
    """
    if manifest.is_symlink():
        raise ValueError(f"{MANIFEST} is a symbolic link")
    if not manifest.exists():
        raise ValueError(f"it was saved without digests: {MANIFEST} is missing")
    if not manifest.is_file():
        raise ValueError(f"{MANIFEST} is neither a file nor a folder")
    content = manifest.read_bytes()
    try:
        files = json.loads(content)["files"]
        whole = content == _content(files) and all(map(_is_file, files.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{MANIFEST}: its bytes are not those that were written")
    return files


def _is_file(row: dict[str, Any]) -> bool:
    return row.keys() == {"sha256", "size"} and type(row["size"]) is int and bool(_SHA256.fullmatch(row["sha256"]))
