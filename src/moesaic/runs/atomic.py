"""Files that are either whole or absent: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

__all__ = [
    "TEMPORARY_SUFFIX",
    "open_atomic",
    "remove_temporaries",
    "sync_file",
    "sync_folder",
    "write_json_atomic",
    "write_text_atomic",
]

TEMPORARY_SUFFIX = ".writing"


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open `path` for writing; its content changes in one step when the block ends, and not at all if it raises.

    Raises: OSError from the disk, with the temporary file gone.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` in one step."""
    with open_atomic(path) as file:
        file.write(text.encode())


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys to `path` in one step. Raises: ValueError for NaN or infinity."""
    write_text_atomic(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def sync_file(path: Path) -> None:
    """Return once the content of `path` is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once the names in `folder` are on the disk, where the file system can sync folders at all."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse fsync on a folder; the rename before it is in order all the same.
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process left half written in `folder` and below."""
    for path in folder.rglob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
