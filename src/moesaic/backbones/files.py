"""Model folders on disk: are they whole, and what do they contain, without reading gigabytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moesaic.backbones.base import BackboneError

__all__ = ["check_model_folder", "content_hash", "folder_fingerprint"]

_EDGE_BYTES = 2**20  # read from either end of a file
_NUM_SAMPLES, _SAMPLE_BYTES = (
    64,
    2**16,
)  # and evenly in between: fine-tuning may leave embeddings and norms as they were
_CONTENT_SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"}
_SHARD_INDEX = "model.safetensors.index.json"


def content_hash(files: Iterable[Path]) -> str:
    """16 hex characters over name, size, both ends and 64 samples of each file (at most 6 MiB), whatever their order.

    Raises BackboneError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        digest.update(hashlib.sha256(path.name.encode()).digest())
        try:
            digest.update(_sampled_digest(path))
        except OSError as error:
            raise BackboneError(f"cannot read {path}: {error.strerror}. Check the path and its permissions.") from error
    return digest.hexdigest()[:16]


def folder_fingerprint(folder: Path) -> str:
    """`content_hash` of a model folder's config, weights and tokenizer. Raises BackboneError if it is not whole."""
    check_model_folder(folder)
    return content_hash(path for path in folder.iterdir() if path.suffix in _CONTENT_SUFFIXES)


def check_model_folder(folder: Path) -> None:
    """Raise BackboneError unless `folder` has a config and whole weight files; only their headers are read."""
    if not folder.is_dir():
        raise BackboneError(f"{folder} is not a folder. Give a folder with config.json and weights, or a hub name.")
    config = folder / "config.json"
    if not config.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise BackboneError(f"{folder} has no config.json, so it is no Hugging Face model folder. Found: {found}.")
    _read_json(config)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards and not list(folder.glob("*.bin")):
        raise BackboneError(f"{folder} has a config.json but no weights (*.safetensors or *.bin); download them too.")
    if (folder / _SHARD_INDEX).is_file():
        wanted = set(_read_json(folder / _SHARD_INDEX).get("weight_map", {}).values())
        missing = sorted(wanted - {path.name for path in shards})
        if missing:
            raise BackboneError(f"{folder} lacks {len(missing)} of {len(wanted)} weight files: {', '.join(missing)}.")
    for shard in shards:
        _check_safetensors(shard)


def _sampled_digest(path: Path) -> bytes:
    size = path.stat().st_size
    samples = [(size * i // _NUM_SAMPLES, _SAMPLE_BYTES) for i in range(_NUM_SAMPLES)]
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset, length in [(0, _EDGE_BYTES), *samples, (max(0, size - _EDGE_BYTES), _EDGE_BYTES)]:
            file.seek(offset)
            digest.update(file.read(length))
    return digest.digest()


def _check_safetensors(path: Path) -> None:
    try:  # opening compares the size that the header promises with the file's
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise BackboneError(
            f"{path} ({size} bytes) is corrupt or cut off: {error}. Download or write it again."
        ) from error


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"cannot read {path}: {error}. Download or write it again.") from error
