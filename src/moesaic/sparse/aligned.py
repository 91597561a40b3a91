"""A partition for a router that has nothing to learn: neurons go to the block whose tokens excite them.

Source: ours, for arXiv:2406.00023, whose experts exist before the router. Shapes: T tokens, F neurons, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.grap import Grap
from moesaic.sparse.kmeans import balanced_assignment
from moesaic.sparse.partition import Partition
from moesaic.sparse.stats import NeuronStats, hidden_chunks

__all__ = ["ScoreAligned", "excitation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreAligned(Partition):
    """Blocks that fit the directions of `score`: equal blocks of the largest total `excitation`, nearly."""

    score: Grap

    needs_stats: ClassVar[bool] = True

    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        assert stats is not None
        best_T = self.score.affinity(stats.x_TD, self.num_blocks).argmax(dim=1)
        return balanced_assignment(-excitation(ffn, stats.x_TD, best_T, self.num_blocks))


def excitation(ffn: DenseFFN, x_TD: Tensor, block_T: Tensor, num_blocks: int) -> Tensor:
    """float32 (F, B): the mean of |h| of a neuron over the tokens of a block, over its mean over all tokens.

    1 (neither for nor against) where a block has no token or a neuron is never active.
    """
    sum_BF = torch.zeros(num_blocks, ffn.width, device=ffn.up_FD.device)
    first = 0
    for h_TF in hidden_chunks(ffn, x_TD):
        chunk_T = block_T[first : first + len(h_TF)].to(h_TF.device)
        sum_BF.index_add_(0, chunk_T, h_TF.abs())
        first += len(h_TF)
    counts_B1 = torch.bincount(block_T, minlength=num_blocks).to(sum_BF.device)[:, None]
    mean_F = sum_BF.sum(0) / len(x_TD)
    ratio_BF = sum_BF / counts_B1 / mean_F
    return torch.where((counts_B1 > 0) & (mean_F > 0), ratio_BF, 1.0).t().contiguous()
