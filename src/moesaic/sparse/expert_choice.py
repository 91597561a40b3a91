"""Expert choice: every block takes its best tokens, however many blocks a token gets then.

Source: arXiv:2202.09368. Shapes: T tokens, B blocks, N scopes, C tokens of a scope.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moesaic.sparse.resonance import best_of
from moesaic.sparse.routing import Routing
from moesaic.sparse.select import RoutingContext, Selection

__all__ = ["ExpertChoice"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertChoice(Selection):
    """Each block takes the C * `blocks_per_token` / B best of a scope's C tokens, rounded, at least one.

    A scope is a sequence, or the whole batch. Not causal in either: later tokens push earlier ones out.
    """

    blocks_per_token: float
    scope: Literal["sequence", "microbatch"] = "microbatch"

    knob: ClassVar[str] = "blocks_per_token"

    def __post_init__(self) -> None:
        if not self.blocks_per_token > 0:
            raise ValueError(f"select.blocks_per_token={self.blocks_per_token} must be above 0")

    @property
    def causal(self) -> bool:
        return False

    def share(self, num_blocks: int) -> float:
        return self.blocks_per_token / num_blocks

    def check(self, num_blocks: int) -> None:
        if self.blocks_per_token > num_blocks:
            raise ValueError(
                f"select.blocks_per_token={self.blocks_per_token:g} exceeds partition.num_blocks={num_blocks}. "
                "Lower it or cut more blocks."
            )

    def __call__(self, score_TB: Tensor, context: RoutingContext | None = None) -> Routing:
        if not len(score_TB):
            return Routing.from_mask(score_TB > 0)
        scopes = context.num_sequences if context is not None and self.scope == "sequence" else 1
        score_NCB = score_TB.detach().unflatten(0, (scopes, -1))
        num_scopes, num_tokens, num_blocks = score_NCB.shape
        taken = max(1, round(num_tokens * self.blocks_per_token / num_blocks))
        slots_NB = torch.full((num_scopes, num_blocks), taken, device=score_TB.device)
        everyone_NCB = torch.ones_like(score_NCB, dtype=torch.bool)
        return Routing.from_mask(best_of(score_NCB, everyone_NCB, slots_NB).flatten(0, 1))
