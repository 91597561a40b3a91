"""Top-k with k as a share of the blocks, for models whose number of blocks follows from their width.

Shapes: T tokens, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from moesaic.sparse.routing import Routing
from moesaic.sparse.select import RoutingContext, Selection, top_blocks

__all__ = ["TopShare"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TopShare(Selection):
    """The best round(active_frac * B) blocks of each token run. Raises ValueError for a share outside 0..1."""

    active_frac: float

    knob: ClassVar[str] = "active_frac"

    def __post_init__(self) -> None:
        if not 0 <= self.active_frac <= 1:
            raise ValueError(f"select.active_frac={self.active_frac} is outside 0..1, the share of blocks that run")

    def __call__(self, score_TX: Tensor, context: RoutingContext | None = None) -> Routing:
        best_TK = top_blocks(score_TX, round(self.active_frac * score_TX.shape[1]))
        # A mask and not the list of chosen blocks: with a block per neuron, sorting that list costs more than the FFN.
        return Routing.from_mask(torch.zeros_like(score_TX, dtype=torch.bool).scatter(1, best_TK, True))

    def share(self, num_blocks: int) -> float:
        return self.active_frac

    def with_share(self, share: float, num_blocks: int) -> TopShare:
        return replace(self, active_frac=share)

    def matched(self, score_TX: Tensor, share: float, num_blocks: int) -> Selection:
        return self.with_share(share, num_blocks)
