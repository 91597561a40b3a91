"""Balance losses: how unevenly blocks are used, as pure functions of one layer's router outputs. All float32.

Source: arXiv:1701.06538 sec. 4 and app. A (importance and load of a noisy top-k router); arXiv:2401.13920 (LocMoE)
eq. 5-7 (top share and locality). Shapes: T tokens, B blocks, N sequences, C tokens of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "load",
    "locality_divergence",
    "max_violation",
    "selected_softmax",
    "squared_variation",
    "top_share_penalty",
]


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


def top_share_penalty(prob_TB: Tensor) -> Tensor:
    """B * sum over blocks of (share of tokens whose best block it is) * (mean probability): 1 where both are uniform.

    Only the probabilities carry a gradient.
    """
    num_blocks = prob_TB.shape[1]
    best_T = prob_TB.argmax(dim=1)
    share_B = torch.zeros_like(prob_TB[0]).scatter_add(0, best_T, torch.ones_like(prob_TB[:, 0])) / len(prob_TB)
    return num_blocks * (share_B * prob_TB.mean(dim=0)).sum()


def locality_divergence(prob_NCB: Tensor, num_nodes: int, leak: float) -> Tensor:
    """KL(current || local), mean over nodes: how far tokens ask for blocks of other nodes than their own.

    Sequences and blocks are dealt to `num_nodes` nodes in order and evenly. A node's current distribution is the mean
    probability of its tokens; the local one has `leak` (0..1) of its mass outside the node's blocks, all blocks of a
    kind alike. One node: against the uniform distribution. Raises ValueError for more nodes than sequences, or a number
    of blocks that the nodes do not divide.
    """
    num_sequences, _, num_blocks = prob_NCB.shape
    if num_blocks % num_nodes or num_sequences < num_nodes:
        raise ValueError(
            f"nodes={num_nodes} cannot share {num_blocks} blocks and {num_sequences} sequences: nodes must divide the "
            "number of blocks, and be at most the batch size."
        )
    own = num_blocks // num_nodes
    node_B = torch.arange(num_blocks, device=prob_NCB.device) // own
    terms = []
    for node, prob_nCB in enumerate(prob_NCB.tensor_split(num_nodes)):
        current_B = prob_nCB.flatten(0, 1).mean(dim=0)
        local_B = torch.where(node_B == node, (1 - leak) / own, leak / max(1, num_blocks - own))
        if num_nodes == 1:
            local_B = torch.full_like(current_B, 1 / num_blocks)
        terms.append((torch.xlogy(current_B, current_B) - current_B * local_B.log()).sum())
    return torch.stack(terms).mean()


def max_violation(load_B: Tensor) -> Tensor:
    """Largest over mean load, minus 1 (0-dim): 0 for equal loads. Source: arXiv:2408.15664."""
    load_B = load_B.float()
    return load_B.max() / load_B.mean() - 1
