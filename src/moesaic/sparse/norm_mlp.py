"""D2DMoE's router: a small ReLU network that regresses the length of each block's output.

Source: arXiv:2310.04361 sec. 3.2. Shapes: T tokens, D model dim, B blocks, W hidden width of the router.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor, nn

from moesaic.sparse.experts import Experts
from moesaic.sparse.precision import full_precision
from moesaic.sparse.score import Score, ScoreModule

__all__ = ["NormMLP"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NormMLP(Score):
    """|W2 relu(W1 x)|, no biases; weights start uniform in +-1/sqrt(inputs), PyTorch's default.

    `hidden_dim` W; None is a quarter of D, at least 1. Raises ValueError for a W below 1.
    """

    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ValueError(f"score.hidden_dim={self.hidden_dim} must be at least 1; null is a quarter of D")

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _NormMLPModule(self, dim, num_blocks)


class _NormMLPModule(ScoreModule):
    def __init__(self, config: NormMLP, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        width = config.hidden_dim or max(1, dim // 4)
        self.in_WD = nn.Parameter(torch.zeros(width, dim))
        self.out_BW = nn.Parameter(torch.zeros(num_blocks, width))

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        with full_precision(x_TD.device):
            return nnf.linear(nnf.linear(x_TD.float(), self.in_WD.float()).relu(), self.out_BW.float()).abs()

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        for weight in (self.in_WD, self.out_BW):
            bound = weight.shape[1] ** -0.5
            weight.uniform_(-bound, bound, generator=generator)
