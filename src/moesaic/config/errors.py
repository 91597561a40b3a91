"""The one error a wrong configuration raises, and the words that suggest a nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ConfigError", "did_you_mean"]


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the full path, what is allowed and the nearest name."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'name'?" for the name of `allowed` nearest to `given`, or "" where none is near.

    Case is ignored, so that `topk` finds `TopK`.
    """
    by_lower = {name.lower(): name for name in allowed}
    close = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""
