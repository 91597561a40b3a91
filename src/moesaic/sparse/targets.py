"""How much each block does for each token, from the experts' own activations: labels for routers, and the oracles.

Source: arXiv:2110.01786 sec. 3.3 (positive); arXiv:2310.04361 (output_norm); l1, l2sq and abs_sum as offered by
github.com/pjlab-sys4nlp/llama-moe. All float32. The output bias never counts.
Shapes: T tokens, D model dim, B blocks, S neurons per block, F = B * S.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from moesaic.sparse.experts import Experts
from moesaic.sparse.precision import full_precision
from moesaic.sparse.stats import hidden_chunks

__all__ = [
    "Target",
    "block_targets",
    "captured_mass",
    "expert_targets",
    "normalise_targets",
    "output_norms",
    "quantile_scale",
]

Target = Literal["positive", "abs_sum", "l1", "l2", "l2sq", "output_norm"]

_MASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": lambda h_TBS: h_TBS.clamp(min=0).sum(-1),
    "abs_sum": lambda h_TBS: h_TBS.sum(-1).abs(),
    "l1": lambda h_TBS: h_TBS.abs().sum(-1),
    "l2": lambda h_TBS: h_TBS.norm(dim=-1),
    "l2sq": lambda h_TBS: h_TBS.square().sum(-1),
}


def expert_targets(experts: Experts, x_TD: Tensor, target: Target) -> Tensor:
    """float32 (T, B) >= 0, without gradient: `block_targets` of `experts` on the FFN inputs `x_TD`, in chunks."""
    shape = (experts.num_blocks, experts.block_size)
    down_BSD = experts.down_BSD.detach()
    none_TB = x_TD.new_zeros(0, experts.num_blocks, dtype=torch.float32)
    with full_precision(x_TD.device):
        chunks = hidden_chunks(experts.dense_ffn(), x_TD)
        return torch.cat([none_TB, *(block_targets(h_TF.unflatten(1, shape), target, down_BSD) for h_TF in chunks)])


def block_targets(h_TBS: Tensor, target: Target, down_BSD: Tensor) -> Tensor:
    """float32 (T, B) >= 0 from the hidden activations of every block.

    positive: sum of the positive ones; abs_sum: |sum|; l1: sum of |h|; l2: length of h; l2sq: sum of h^2; output_norm:
    length of the block's output, the only one that reads `down_BSD`.
    """
    if target == "output_norm":
        return output_norms(h_TBS, down_BSD)
    return _MASSES[target](h_TBS.float())


def output_norms(h_TBS: Tensor, down_BSD: Tensor) -> Tensor:
    """float32 (T, B): ||h_b down_b|| of every token and block, through the blocks' Gram matrices where that is cheaper.

    Differs from a direct product by float32 rounding only: ||h down||^2 = h (down down^T) h^T.
    """
    num_tokens, _, size = h_TBS.shape
    dim = down_BSD.shape[2]
    h_BTS, down_BSD = h_TBS.float().transpose(0, 1), down_BSD.float()
    if size * dim < num_tokens * (dim - size):
        gram_BSS = down_BSD @ down_BSD.mT
        return ((h_BTS @ gram_BSS) * h_BTS).sum(-1).clamp(min=0).sqrt().T.contiguous()
    # One block at a time: (B, T, D) would not fit for hundreds of blocks.
    return torch.stack([(h_TS @ down_SD).norm(dim=1) for h_TS, down_SD in zip(h_BTS, down_BSD, strict=True)], dim=1)


def quantile_scale(target_TB: Tensor, quantile: float = 0.999) -> float:
    """The smallest entry that at least a share `quantile` of all entries does not exceed."""
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile={quantile} is outside 0..1 (0 excluded)")
    flat = target_TB.flatten()
    return flat.kthvalue(math.ceil(quantile * flat.numel())).values.item()


def normalise_targets(target_TB: Tensor, scale: float) -> Tensor:
    """Targets over `scale` (a quantile; as published a batch's maximum), clipped to 0..1; all 0 if scale is 0."""
    if scale <= 0:
        return torch.zeros_like(target_TB)
    return (target_TB / scale).clamp(0.0, 1.0)


def captured_mass(target_TB: Tensor, active_TB: Tensor) -> float:
    """Mean over tokens of the share of a token's mass that its active blocks hold, 0..1.

    Tokens without any mass say nothing about a choice of blocks and are left out; 1 if no token has mass.
    """
    total_T = target_TB.sum(1)
    kept_T = (target_TB * active_TB).sum(1)
    has_mass_T = total_T > 0
    if not bool(has_mass_T.any()):
        return 1.0
    return (kept_T[has_mass_T] / total_T[has_mass_T]).mean().item()
