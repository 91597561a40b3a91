"""Balance losses: how unevenly blocks are used, as pure functions of one layer's router outputs. All float32.

Source: arXiv:1701.06538 sec. 4 and app. A (importance and load of a noisy top-k router).
Shapes: T tokens, B blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["load", "selected_softmax", "squared_variation"]


def squared_variation(amount_B: Tensor) -> Tensor:
    """CV^2 of non-negative amounts (0-dim): unbiased variance / (mean^2 + 1e-10). Equal: 0; all on one of B: B."""
    amount_B = amount_B.float()
    return amount_B.var() / (amount_B.mean().square() + 1e-10)


def selected_softmax(logits_TB: Tensor, active_TB: Tensor) -> Tensor:
    """(T, B): softmax over each token's active blocks, 0 elsewhere. Its sum over tokens is the blocks' importance."""
    return logits_TB.float().masked_fill(~active_TB, -torch.inf).softmax(dim=1).masked_fill(~active_TB, 0.0)


def load(clean_TB: Tensor, noise_TB: Tensor, std_TB: Tensor, k: int, *, noise_alone: bool = False) -> Tensor:
    """(B,): the expected number of tokens whose top k holds the block, were its noise drawn again and no other's.

    Differentiable, unlike a count. `noise_TB` is what was added to the clean logits, `std_TB` its standard deviation.
    A block in the top k has to beat the (k+1)-th noisy logit, one outside the k-th: `noise_alone` decides which of
    the two applies by comparing the noise instead of the noisy logit, as the released code of LLaMA-MoE does.
    Where k is B every block is in: the load is T each.
    """
    num_tokens, num_blocks = clean_TB.shape
    if k >= num_blocks:
        return clean_TB.new_full((num_blocks,), float(num_tokens))
    noisy_TB = clean_TB + noise_TB
    best_TK = noisy_TB.topk(k + 1, dim=1).values
    last_in_T1, first_out_T1 = best_TK[:, k - 1 : k], best_TK[:, k : k + 1]
    inside_TB = (noise_TB if noise_alone else noisy_TB) > first_out_T1
    threshold_TB = torch.where(inside_TB, first_out_T1, last_in_T1)
    return torch.special.ndtr((clean_TB - threshold_TB) / std_TB).sum(dim=0)
