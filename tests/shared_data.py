"""Where the real inputs of some tests lie: beside the project, never in it; tests skip where they are absent."""

import os
from pathlib import Path

__all__ = ["SHARED"]

SHARED = Path(os.environ.get("MOESAIC_SHARED", Path(__file__).parents[2] / "shared"))
