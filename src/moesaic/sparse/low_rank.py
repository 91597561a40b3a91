"""Deja Vu's predictor: one linear map of low rank from the FFN's input to a logit per block.

Source: arXiv:2310.17157. Shapes: T tokens, D model dim, B blocks, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor, nn

from moesaic.sparse.experts import Experts
from moesaic.sparse.precision import full_precision
from moesaic.sparse.score import Score, ScoreModule

__all__ = ["LowRank"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank(Score):
    """x A C without bias, and nothing between the two; weights start uniform in +-1/sqrt(inputs), PyTorch's default.

    `rank_frac`: the rank over D, so that one number serves models of any width; the rank is at least 1.
    Raises ValueError for a share that is not above 0.
    """

    rank_frac: float = 0.125

    def __post_init__(self) -> None:
        if self.rank_frac <= 0:
            raise ValueError(f"score.rank_frac={self.rank_frac} must be above 0; 1 can represent any linear map")

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _LowRankModule(self, dim, num_blocks)


class _LowRankModule(ScoreModule):
    def __init__(self, config: LowRank, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        rank = max(1, round(config.rank_frac * dim))
        self.in_RD = nn.Parameter(torch.zeros(rank, dim))
        self.out_BR = nn.Parameter(torch.zeros(num_blocks, rank))

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        with full_precision(x_TD.device):
            return nnf.linear(nnf.linear(x_TD.float(), self.in_RD.float()), self.out_BR.float())

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        for weight in (self.in_RD, self.out_BR):
            bound = weight.shape[1] ** -0.5
            weight.uniform_(-bound, bound, generator=generator)
