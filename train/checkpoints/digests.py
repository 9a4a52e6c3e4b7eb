"""Digests of the files in a folder, to detect damage.

`write` puts a manifest, `digests.json`, beside the files::

    {"files": {"state/d/ab12": {"sha256": "9f86d0...", "size": 1234}, ...}, "version": 1}

Paths are relative to the folder. The manifest is written atomically, after all the files that it names.
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
    """Writes the manifest of all files in a folder and its subfolders.

    Raises:
        ValueError: the folder holds something other than files and folders, such as a symbolic link.
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    fresh = folder / f".{MANIFEST}"
    # An old manifest would describe the new files as damaged. One that a killed process had not renamed yet is none of
    # the files.
    for old in (folder / MANIFEST, fresh):
        old.unlink(missing_ok=True)
    files = {}
    for name, entry in _entries(folder):
        if not entry.is_file(follow_symlinks=False):
            raise ValueError(f"{folder / name} {_kind(entry)}")
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())  # a power failure must not lose a file that the manifest names
        files[name] = {"sha256": _sha256(folder / name), "size": entry.stat(follow_symlinks=False).st_size}
    for below in {(folder / name).parent for name in files}:
        flush(below)
    with fresh.open("wb") as file:
        file.write(_content(files))
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(folder / MANIFEST)
    flush(folder)


def damage(folder: Path) -> str | None:
    """Compares a folder with its manifest.

    Reads nothing outside the folder, whatever it contains. Compares all sizes before it reads any file.

    Returns:
        A description of the first problem, with the name of the file; None if every file is intact.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is not a folder"
    try:
        files = _read(folder / MANIFEST)
        found = dict(_entries(folder))
        found.pop(MANIFEST, None)
        wrong = _strange(found, files)
        if wrong is None:
            wrong = next((name for name in sorted(files) if _sha256(folder / name) != files[name]["sha256"]), None)
            wrong = None if wrong is None else f"{wrong}: its content changed after it was written"
    except (OSError, ValueError) as error:
        return str(error)
    return wrong


def flush(folder: Path) -> None:
    """Flushes a folder to disk, so that renames in it survive a power failure, if the file system supports that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _strange(found: dict[str, os.DirEntry[str]], files: dict[str, Any]) -> str | None:
    """The first file that is missing, additional, of another kind or of another size."""
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
            return f"{name} has {size} bytes, but was written with {wanted}"
    return None


def _entries(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All entries of a folder and its subfolders except folders, by relative path. Does not follow symbolic links."""
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
    """Reads the files of a manifest.

    Raises:
        ValueError: the manifest is missing, or differs from the bytes that `write` would write.
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
        # Encoded again: any changed byte shows, even one that JSON ignores.
        whole = content == _content(files) and all(map(_is_file, files.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{MANIFEST}: its content changed after it was written")
    return files


def _is_file(row: dict[str, Any]) -> bool:
    return row.keys() == {"sha256", "size"} and type(row["size"]) is int and bool(_SHA256.fullmatch(row["sha256"]))
