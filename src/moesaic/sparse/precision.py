"""Where float32 is kept: routing decisions, labels and losses, whatever autocast says about matrix products."""

from __future__ import annotations

import torch

__all__ = ["full_precision"]


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which matrix products keep the dtype of their operands: autocast is off for `device`."""
    return torch.autocast(device_type=device.type, enabled=False)
