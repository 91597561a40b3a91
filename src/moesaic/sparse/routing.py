"""Routing: which block runs for which token and with which weight, however that was decided.

Shapes: T tokens, B blocks, N (token, block) assignments, K blocks per token where every token has the same number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Routing"]


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The assignments of tokens to blocks, sorted by (block, token), each pair at most once.

    `token_N` and `block_N` are int64, `weight_N` is float32 and may carry a gradient, `counts_B` (int64) is the number
    of tokens of each block, so that rows `counts_B[:b].sum()` onwards belong to block b. `num_tokens` is T. `dense_TB`
    is what `weight_TB()` returns, where it was known when the routing was made.
    """

    token_N: Tensor
    block_N: Tensor
    weight_N: Tensor
    counts_B: Tensor
    num_tokens: int
    dense_TB: Tensor | None = None

    @classmethod
    def from_topk(cls, block_TK: Tensor, weight_TK: Tensor | None, num_blocks: int) -> Routing:
        """Routing of a rectangular choice: token t runs the K distinct blocks `block_TK[t]`, in any order.

        `weight_TK` None means weight 1. K may be 0.
        """
        num_tokens, k = block_TK.shape
        flat_N = block_TK.reshape(-1)
        # A stable sort keeps the tokens of one block in order, because row-major order is token order.
        block_N, order_N = flat_N.sort(stable=True)
        weight_N = flat_N.new_ones(flat_N.shape, dtype=torch.float32)
        if weight_TK is not None:
            weight_N = weight_TK.float().reshape(-1)[order_N]
        return cls(
            token_N=order_N // max(k, 1),
            block_N=block_N,
            weight_N=weight_N,
            counts_B=_counts(block_N, num_blocks),
            num_tokens=num_tokens,
        )

    @classmethod
    def from_mask(cls, active_TB: Tensor, weight_TB: Tensor | None = None) -> Routing:
        """Routing of a boolean (T, B) choice; weights: the active entries of `weight_TB`, or 1 where it is None."""
        block_N, token_N = active_TB.t().nonzero(as_tuple=True)
        if weight_TB is None:
            weight_N, dense_TB = active_TB.new_ones(token_N.shape, dtype=torch.float32), active_TB.float()
        else:
            weight_N = weight_TB.float()[token_N, block_N]
            dense_TB = torch.where(active_TB, weight_TB.float(), 0.0)
        return cls(
            token_N=token_N,
            block_N=block_N,
            weight_N=weight_N,
            counts_B=active_TB.sum(dim=0),
            num_tokens=active_TB.shape[0],
            dense_TB=dense_TB,
        )

    @classmethod
    def of_all(cls, weight_TB: Tensor) -> Routing:
        """Routing that runs every block for every token, with these weights."""
        num_tokens, num_blocks = weight_TB.shape
        routing = cls.from_prefix(num_blocks, num_tokens=num_tokens, num_blocks=num_blocks, device=weight_TB.device)
        return replace(routing, weight_N=weight_TB.float().t().reshape(-1), dense_TB=weight_TB.float())

    @classmethod
    def from_prefix(cls, k: int, *, num_tokens: int, num_blocks: int, device: torch.device | str = "cpu") -> Routing:
        """Routing of a static choice: every token runs blocks 0..k-1 with weight 1 (k 0: none, k B: all)."""
        block_N = torch.arange(k, device=device).repeat_interleave(num_tokens)
        return cls(
            token_N=torch.arange(num_tokens, device=device).repeat(k),
            block_N=block_N,
            weight_N=torch.ones(k * num_tokens, device=device),
            counts_B=torch.where(torch.arange(num_blocks, device=device) < k, num_tokens, 0),
            num_tokens=num_tokens,
        )

    @property
    def num_blocks(self) -> int:
        """B."""
        return self.counts_B.shape[0]

    def with_weight(self, weight_N: Tensor) -> Routing:
        """The same assignments with other weights (cast to float32)."""
        assert weight_N.shape == self.token_N.shape, (weight_N.shape, self.token_N.shape)
        return replace(self, weight_N=weight_N.float(), dense_TB=None)

    def weight_TB(self) -> Tensor:
        """Dense (T, B) float32 weights, 0 where a block does not run; differentiable in `weight_N`."""
        if self.dense_TB is not None:
            return self.dense_TB
        empty_TB = self.weight_N.new_zeros(self.num_tokens, self.num_blocks)
        return empty_TB.index_put((self.token_N, self.block_N), self.weight_N)

    def active_TB(self) -> Tensor:
        """Boolean (T, B): which blocks run, also those whose weight is 0."""
        active_TB = torch.zeros(self.num_tokens, self.num_blocks, dtype=torch.bool, device=self.block_N.device)
        return active_TB.index_put((self.token_N, self.block_N), active_TB.new_ones(()))

    def count_T(self) -> Tensor:
        """int64 (T,): how many blocks run for each token."""
        return _counts(self.token_N, self.num_tokens)


def _counts(index_N: Tensor, length: int) -> Tensor:
    # Not bincount: its output size depends on data, which breaks a compiled graph.
    return index_N.new_zeros(length).scatter_add(0, index_N, torch.ones_like(index_N))
