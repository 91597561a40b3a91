"""Weights from a softmax of the scores with a temperature of its own, which may be learned.

Source: arXiv:2406.00023 eq. 1 (a softmax gate, not said of what). Differs: the learned, scaled form is ours.
Shapes: T tokens, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.sparse.combine import Combine, CombineModule
from moesaic.sparse.routing import Routing

__all__ = ["SoftmaxCombine", "SoftmaxCombineModule"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxCombine(Combine):
    """Weights softmax(gamma * score) over all blocks (weight score), or over the token's active ones (renormalised).

    `learn_gamma`: gamma is one trained number per layer. From gamma 0 with `scale` total, which is B, every weight
    starts at 1, and gamma has a gradient all the same: a converted model starts as it was cut.
    """

    weight: Literal["one", "score", "renormalised"] = "score"
    gamma: float = 1.0
    learn_gamma: bool = False

    def __post_init__(self) -> None:
        if self.weight == "one":
            raise ValueError("combine.weight=one has no softmax. Use moesaic.sparse.combine.Combine.")
        super(SoftmaxCombine, self).__post_init__()

    def build(self, dim: int, num_blocks: int) -> CombineModule:
        """The module for one layer, gamma at its start."""
        return SoftmaxCombineModule(self, dim, num_blocks)


class SoftmaxCombineModule(CombineModule):
    """The combination of one layer; `gamma` is a 0-dim parameter where it is learned, else None."""

    config: SoftmaxCombine

    def __init__(self, config: SoftmaxCombine, dim: int, num_blocks: int) -> None:
        super().__init__(config, dim, num_blocks)
        self.gamma = nn.Parameter(torch.full((), config.gamma)) if config.learn_gamma else None

    def forward(self, routing: Routing, score_TB: Tensor) -> Routing:
        gamma = self.config.gamma if self.gamma is None else self.gamma.float()
        return super().forward(routing, (gamma * score_TB.float()).softmax(dim=1))
