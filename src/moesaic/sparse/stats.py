"""What the neurons of a dense FFN do on calibration inputs: means and co-activation, computed chunk by chunk.

Source: arXiv:2110.01786 sec. 3.2 (co-activation graph). Differs: |h| stands for h, so that gated FFNs count too.
Shapes: T tokens, D model dim, F neurons, B blocks, S neurons per block, C groups of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.experts import Experts

__all__ = ["NeuronStats", "block_means", "hidden_chunks"]

_CHUNK_TOKENS = 4096
_COUNTED_TOKENS = 8  # tokens whose products are summed before the released code cuts the sum at 1


@dataclass(frozen=True, slots=True, eq=False)
class NeuronStats:
    """Statistics of the hidden activations h of `ffn` on calibration inputs `x_TD`; each call runs over all of them.

    `window_T` is the window of text that each input came from; `gradient_TD` is dL/dy of the FFN's outputs. Both are
    None where nobody needs them.
    """

    ffn: DenseFFN
    x_TD: Tensor
    window_T: Tensor | None = None
    gradient_TD: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.x_TD):
            raise ValueError("no calibration tokens: statistics of neurons need at least one (calibration_tokens > 0).")

    def mean_activation(self) -> Tensor:
        """float32 (F,): mean of h over the tokens."""
        return self._mean(lambda h_TF: h_TF)

    def mean_abs(self) -> Tensor:
        """float32 (F,): mean of |h| over the tokens."""
        return self._mean(torch.abs)

    def mean_abs_output(self) -> Tensor:
        """float32 (F,): mean of |h_i| times the length of the neuron's down row: the size of what it adds."""
        return self.mean_abs() * self.ffn.down_FD.detach().float().norm(dim=1)

    def gradient_importance(self, group_T: Tensor, num_groups: int) -> Tensor:
        """float32 (C, F): mean over the tokens of each of C groups of |h_i dL/dh_i|; 0 for a group without tokens.

        By how much the loss would change, to first order, if the neuron were taken away. Source: arXiv:2406.16554.
        """
        assert self.gradient_TD is not None
        total_CF = torch.zeros(num_groups, self.ffn.width, device=self.ffn.up_FD.device)
        gradients = self.gradient_TD.split(_CHUNK_TOKENS)
        groups = group_T.to(total_CF.device).split(_CHUNK_TOKENS)
        for h_TF, g_TD, chunk_T in zip(hidden_chunks(self.ffn, self.x_TD), gradients, groups, strict=True):
            down_FD = self.ffn.down_FD.detach().float()
            total_CF.index_add_(0, chunk_T, (h_TF * (g_TD.to(down_FD) @ down_FD.mT)).abs())
        return total_CF / torch.bincount(group_T, minlength=num_groups).clamp(min=1)[:, None].to(total_CF)

    def mean_abs_input(self) -> Tensor:
        """float32 (F,): mean of |x . w|, w the neuron's row of the first linear layer; its bias is left out."""
        first_FD = self.ffn.up_FD if self.ffn.gate_FD is None else self.ffn.gate_FD
        total_F = torch.zeros(self.ffn.width, dtype=torch.float64, device=first_FD.device)
        for x_tD in self.x_TD.split(_CHUNK_TOKENS):
            total_F += (x_tD.to(first_FD) @ first_FD.detach().mT).float().abs().sum(0, dtype=torch.float64)
        return (total_F / len(self.x_TD)).float()

    def coactivation(self) -> Tensor:
        """float32 (F, F), symmetric and >= 0: sum over the tokens of |h_i| |h_j|."""
        total_FF = torch.zeros(self.ffn.width, self.ffn.width, device=self.ffn.up_FD.device)
        for h_TF in hidden_chunks(self.ffn, self.x_TD):
            abs_TF = h_TF.abs()
            total_FF.addmm_(abs_TF.mT, abs_TF)
        return total_FF

    def clamped_coactivation(self) -> Tensor:
        """Like `coactivation`, but the sum of every 8 tokens is cut at 1, as in the released code (slow: F^2 per 8)."""
        total_FF = torch.zeros(self.ffn.width, self.ffn.width, device=self.ffn.up_FD.device)
        for h_TF in hidden_chunks(self.ffn, self.x_TD):
            for few_TF in h_TF.abs().split(_COUNTED_TOKENS):
                total_FF += (few_TF.mT @ few_TF).clamp_(max=1.0)
        return total_FF

    def _mean(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        total_F = torch.zeros(self.ffn.width, dtype=torch.float64, device=self.ffn.up_FD.device)
        for h_TF in hidden_chunks(self.ffn, self.x_TD):
            total_F += of(h_TF).sum(0, dtype=torch.float64)
        return (total_F / len(self.x_TD)).float()


def hidden_chunks(ffn: DenseFFN, x_TD: Tensor) -> Iterator[Tensor]:
    """Hidden activations (t, F) of up to 4096 tokens at a time: computed in the FFN's dtype, handed out in float32."""
    with torch.no_grad():
        for chunk_TD in x_TD.split(_CHUNK_TOKENS):
            yield ffn.hidden(chunk_TD.to(ffn.up_FD)).float()


def block_means(experts: Experts, x_TD: Tensor) -> Tensor:
    """float32 (B, D): each block's mean output over the tokens, output bias excluded.

    The down matrix is linear, so this is the block's mean activation times it.
    """
    mean_F = NeuronStats(experts.dense_ffn(), x_TD).mean_activation()
    mean_BS = mean_F.view(experts.num_blocks, experts.block_size)
    return torch.einsum("bs,bsd->bd", mean_BS, experts.down_BSD.detach().float())
