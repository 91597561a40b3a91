"""Which blocks a token should use, from the Gram matrix of its block outputs: FactorLLM's labels and scale.

With G_ij = <e_i, e_j> for the block outputs e_b of one token and Y = sum_b e_b (the dense output less its bias), every
distance and error below needs G only. All float32. `scale` is the s in y = s * sum of the chosen e_b.
Source: arXiv:2408.11855 sec. 3 (prior-approximate labels) and github.com/zhenwuweihe/FactorLLM. Differs: raw float32
distances, no softmax(-d); best subsets and fitted scales are ours.
Shapes: T tokens, D model dim, B blocks, S neurons per block, C candidate subsets.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from moesaic.sparse.experts import Experts
from moesaic.sparse.precision import full_precision
from moesaic.sparse.select import top_blocks
from moesaic.sparse.stats import hidden_chunks

__all__ = [
    "best_subset",
    "block_grams",
    "fitted_scale",
    "pa_distances",
    "relative_error",
    "singleton_gains",
    "smallest_blocks",
    "subset_error",
]

_MAX_SUBSETS = 128  # more candidates than this are searched greedily
_OUTPUT_ELEMENTS = 2**25  # elements of e_TBD held at once


@torch.no_grad()
def block_grams(experts: Experts, x_TD: Tensor) -> Tensor:
    """float32 (T, B, B): the Gram matrix of the block outputs of every token, output bias excluded, in chunks."""
    down_BSD = experts.down_BSD.detach().float()
    num_blocks, size, dim = down_BSD.shape
    grams = [x_TD.new_zeros(0, num_blocks, num_blocks, dtype=torch.float32)]
    with full_precision(x_TD.device):
        for h_TF in hidden_chunks(experts.dense_ffn(), x_TD):
            for part_TF in h_TF.split(max(1, _OUTPUT_ELEMENTS // (num_blocks * dim))):
                h_BTS = part_TF.unflatten(1, (num_blocks, size)).transpose(0, 1)
                e_TBD = (h_BTS @ down_BSD).transpose(0, 1)
                grams.append(e_TBD @ e_TBD.mT)
    return torch.cat(grams)


def pa_distances(gram_TBB: Tensor, teacher_scale: float, dim: int) -> Tensor:
    """float32 (T, B): mean over the `dim` outputs of (e_b - c Y)^2, each block alone against the scaled dense output.

    c is `teacher_scale`, as published 1 / (B // k).
    """
    with_dense_TB, dense_T1 = gram_TBB.sum(2), gram_TBB.sum((1, 2))[:, None]
    own_TB = gram_TBB.diagonal(dim1=1, dim2=2)
    return (own_TB - 2 * teacher_scale * with_dense_TB + teacher_scale**2 * dense_T1) / dim


def smallest_blocks(distance_TB: Tensor, k: int) -> Tensor:
    """Boolean (T, B): the k blocks with the smallest distance; ties to the lowest block index."""
    return _mask(top_blocks(-distance_TB, k), distance_TB.shape[1])


def subset_error(gram_TBB: Tensor, active_TB: Tensor, scale: float = 1.0) -> Tensor:
    """float32 (T,): ||Y - s Y_S||^2, Y_S the sum of a token's active block outputs."""
    chosen_TB = active_TB.to(gram_TBB.dtype)
    linear_T = (gram_TBB.sum(2) * chosen_TB).sum(1)
    square_T = torch.einsum("tb,tbj,tj->t", chosen_TB, gram_TBB, chosen_TB)
    return gram_TBB.sum((1, 2)) - 2 * scale * linear_T + scale**2 * square_T


def relative_error(gram_TBB: Tensor, active_TB: Tensor, scale: float = 1.0) -> float:
    """Sum of ||Y - s Y_S||^2 over the tokens, over the sum of ||Y||^2: 0 is dense, 1 is as bad as no FFN."""
    dense = gram_TBB.sum(dtype=torch.float64)
    return (subset_error(gram_TBB, active_TB, scale).sum(dtype=torch.float64) / dense).item()


def singleton_gains(gram_TBB: Tensor, scale: float = 1.0) -> Tensor:
    """float32 (T, B): by how much each block alone lowers the `subset_error` of choosing nothing."""
    return 2 * scale * gram_TBB.sum(2) - scale**2 * gram_TBB.diagonal(dim1=1, dim2=2)


def fitted_scale(gram_TBB: Tensor, active_TB: Tensor) -> float:
    """The s that minimises the summed `subset_error`: sum <Y, Y_S> / sum ||Y_S||^2; 1 where nothing is chosen."""
    chosen_TB = active_TB.to(gram_TBB.dtype)
    linear = (gram_TBB.sum(2) * chosen_TB).sum(dtype=torch.float64)
    square = torch.einsum("tb,tbj,tj->t", chosen_TB, gram_TBB, chosen_TB).sum(dtype=torch.float64)
    return (linear / square).item() if square > 0 else 1.0


def best_subset(gram_TBB: Tensor, k: int, scale: float = 1.0) -> Tensor:
    """Boolean (T, B): the k blocks with the least `subset_error` at `scale`.

    Exact up to 128 candidate subsets; beyond, blocks are added one at a time, each the one that lowers the error most.
    Ties go to the lowest block indices.
    """
    num_blocks = gram_TBB.shape[1]
    if math.comb(num_blocks, k) <= _MAX_SUBSETS:
        return _enumerated(gram_TBB, k, scale)
    return _greedy(gram_TBB, k, scale)


def _enumerated(gram_TBB: Tensor, k: int, scale: float) -> Tensor:
    num_tokens, num_blocks, _ = gram_TBB.shape
    subsets_CK = torch.tensor(list(itertools.combinations(range(num_blocks), k)), device=gram_TBB.device)
    chosen_CB = _mask(subsets_CK.long(), num_blocks)
    member_CB = chosen_CB.to(gram_TBB.dtype)
    pairs_CX = (member_CB[:, :, None] * member_CB[:, None, :]).flatten(1)
    linear_TC = gram_TBB.sum(2) @ member_CB.T
    square_TC = gram_TBB.flatten(1) @ pairs_CX.T
    best_T1 = top_blocks(2 * scale * linear_TC - scale**2 * square_TC, 1)
    return chosen_CB[best_T1.view(num_tokens)]


def _greedy(gram_TBB: Tensor, k: int, scale: float) -> Tensor:
    alone_TB = singleton_gains(gram_TBB, scale)
    active_TB = torch.zeros_like(alone_TB, dtype=torch.bool)
    for _ in range(k):
        with_chosen_TB = (gram_TBB @ active_TB.to(gram_TBB.dtype)[:, :, None])[:, :, 0]
        gain_TB = alone_TB - 2 * scale**2 * with_chosen_TB
        best_T1 = top_blocks(gain_TB.masked_fill(active_TB, -math.inf), 1)
        active_TB = active_TB.scatter(1, best_T1, True)
    return active_TB


def _mask(block_TK: Tensor, num_blocks: int) -> Tensor:
    active_TB = torch.zeros(len(block_TK), num_blocks, dtype=torch.bool, device=block_TK.device)
    return active_TB.scatter(1, block_TK, True)
