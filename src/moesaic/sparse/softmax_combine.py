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
    """The combination of one layer; `gamma` is 0-dim, a parameter where it is learned."""

    def __init__(self, config: SoftmaxCombine, dim: int, num_blocks: int) -> None:
        super().__init__(config, dim, num_blocks)
        gamma = torch.full((), config.gamma)
        self.gamma: Tensor
        if config.learn_gamma:
            self.gamma = nn.Parameter(gamma)
        else:
            self.register_buffer("gamma", gamma, persistent=False)

    def forward(self, routing: Routing, score_TB: Tensor) -> Routing:
        return super().forward(routing, (self.gamma.float() * score_TB.float()).softmax(dim=1))
