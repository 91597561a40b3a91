"""manifest.json: sizes and hashes of a finished stage's files, by which a damaged cache entry is found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from moesaic.runs.atomic import sync_file, sync_folder, write_json_atomic
from moesaic.runs.status import STATUS_FILE

__all__ = ["MANIFEST_FILE", "damage", "write_manifest"]

MANIFEST_FILE = "manifest.json"
ALWAYS_HASHED_BYTES = 64 * 2**20  # a larger file with the same size and time of change is taken as it is


def write_manifest(folder: Path) -> None:
    """Flush every file of `folder` to the disk and write the manifest that lists them."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.relative_to(folder).as_posix() in (STATUS_FILE, MANIFEST_FILE):
            continue
        sync_file(path)
        stat = path.stat()
        entry = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(path)}
        files[path.relative_to(folder).as_posix()] = entry
    for subfolder in (p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(subfolder)
    write_json_atomic(folder / MANIFEST_FILE, {"files": files})


def damage(folder: Path) -> str | None:
    """Return what is wrong with a finished folder, None where every file is as its manifest says."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        problems = (_problem(folder / name, entry) for name, entry in files.items())
        return next((problem for problem in problems if problem), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__})"


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return f"{path.name} is missing"
    if stat.st_size != entry["bytes"]:
        return f"{path.name} has {stat.st_size} bytes instead of {entry['bytes']}"
    if stat.st_size > ALWAYS_HASHED_BYTES and stat.st_mtime_ns == entry["mtime_ns"]:
        return None
    return None if _sha256(path) == entry["sha256"] else f"the content of {path.name} has changed"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
