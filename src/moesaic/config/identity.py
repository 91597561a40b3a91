"""Short content hashes: what a configuration is, told in ten characters."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from moesaic.config.strict import to_plain

__all__ = ["IDENTITY_CHARS", "identity"]

IDENTITY_CHARS = 10


def identity(obj: Any) -> str:
    """Return 10 hex characters of sha256 over the canonical JSON of `obj`: a dataclass or a tree of plain values.

    Fields declared with `field(metadata={"identity": False})` do not count, at any depth. 1 and 1.0 differ here; they
    are one value once `strict_object` has put them into a typed field.

    Raises: ValueError for NaN or an infinity, TypeError for a value without a plain form.
    """
    canonical = json.dumps(to_plain(obj, counted_only=True), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:IDENTITY_CHARS]
