"""How far apart the tokens of different blocks lie. Shapes: T tokens, D model dim, B blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

__all__ = ["ch_index", "token_correlation"]


def ch_index(x_TD: Tensor, block_T: Tensor, num_blocks: int) -> float:
    """Spread of the blocks' means over the spread inside blocks (Calinski-Harabasz without degrees of freedom), >= 0.

    sum_b n_b |c_b - c|^2 / sum_t |x_t - c_b(t)|^2. Source: arXiv:2406.00023, figures.
    """
    x_TD = x_TD.double()
    counts_B, sum_BD = _sums(x_TD, block_T, num_blocks)
    center_BD = sum_BD / counts_B.clamp(min=1)[:, None]
    between = (counts_B * (center_BD - x_TD.mean(0)).square().sum(1)).sum()
    within = (x_TD - center_BD[block_T]).square().sum()
    return (between / within.clamp(min=1e-30)).item()


def token_correlation(x_TD: Tensor, block_T: Tensor, num_blocks: int) -> float:
    """Mean cosine of two different tokens of one block, over all such pairs, -1..1; 0 where there is none."""
    counts_B, sum_BD = _sums(nnf.normalize(x_TD.double(), dim=1), block_T, num_blocks)
    pairs = (counts_B * (counts_B - 1)).sum()
    return ((sum_BD.square().sum() - counts_B.sum()) / pairs.clamp(min=1)).item() if pairs else 0.0


def _sums(x_TD: Tensor, block_T: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    counts_B = torch.bincount(block_T, minlength=num_blocks).to(x_TD.dtype)
    return counts_B, x_TD.new_zeros(num_blocks, x_TD.shape[1]).index_add_(0, block_T, x_TD)
