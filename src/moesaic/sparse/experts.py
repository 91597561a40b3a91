"""Experts: the weights of a dense FFN, its neurons re-ordered so that each block is one contiguous slab.

Shapes: F neurons (B * S), B blocks, S neurons per block, D model dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.ffn.dense import DenseFFN

__all__ = ["Experts", "block_order"]


class Experts(nn.Module):
    """The blocks of one FFN: parameters `gate_BSD` (None for a plain FFN), `up_BSD`, `down_BSD`, and biases or None.

    Row s of block b is original neuron `neuron_F[b * S + s]` (a buffer, so it is saved with the weights). `activation`
    and `dropout` are those of the dense FFN; `down_bias_D` is the output bias, added once per token and not per block.
    """

    gate_BSD: nn.Parameter | None
    up_BSD: nn.Parameter
    down_BSD: nn.Parameter
    gate_bias_BS: nn.Parameter | None
    up_bias_BS: nn.Parameter | None
    down_bias_D: nn.Parameter | None
    neuron_F: Tensor

    def __init__(self, ffn: DenseFFN, neuron_F: Tensor, num_blocks: int) -> None:
        """Copy the neurons `neuron_F` of `ffn`, in that order, into `num_blocks` equal blocks (`from_dense` is easier)."""
        super().__init__()
        if neuron_F.numel() % num_blocks:
            raise ValueError(f"{neuron_F.numel()} neurons cannot be cut into {num_blocks} equal blocks.")
        self.activation = ffn.activation
        self.dropout = ffn.dropout
        for name in ("gate", "up", "down"):
            self.register_parameter(f"{name}_BSD", _rows(getattr(ffn, f"{name}_FD"), neuron_F, num_blocks))
        for name in ("gate", "up"):
            self.register_parameter(f"{name}_bias_BS", _rows(getattr(ffn, f"{name}_bias_F"), neuron_F, num_blocks))
        self.register_parameter("down_bias_D", _copy(ffn.down_bias_D))
        self.register_buffer("neuron_F", neuron_F.to(device=ffn.up_FD.device, dtype=torch.int64).clone())

    @classmethod
    def from_dense(cls, ffn: DenseFFN, block_F: Tensor) -> Experts:
        """The experts that `block_F` (int64, block of each neuron, every block equally often) cuts `ffn` into.

        Works on meta tensors. Raises ValueError if `block_F` has the wrong length or its blocks differ in size.
        """
        if block_F.numel() != ffn.width:
            raise ValueError(f"block_F labels {block_F.numel()} neurons but the FFN has {ffn.width}.")
        neuron_F, num_blocks = block_order(block_F)
        return cls(ffn, neuron_F, num_blocks)

    @classmethod
    def contiguous(cls, ffn: DenseFFN, num_blocks: int) -> Experts:
        """The experts that hold the neurons of `ffn` in their own order; on meta tensors the empty shell for loading."""
        return cls(ffn, torch.arange(ffn.width), num_blocks)

    @property
    def num_blocks(self) -> int:
        """B."""
        return self.up_BSD.shape[0]

    @property
    def block_size(self) -> int:
        """S, neurons per block."""
        return self.up_BSD.shape[1]

    @property
    def dim(self) -> int:
        """D."""
        return self.up_BSD.shape[2]

    @property
    def gated(self) -> bool:
        """Whether the hidden units are act(gate) * up rather than act(up)."""
        return self.gate_BSD is not None

    def block_of_neuron(self) -> Tensor:
        """int64 (F,): the block of each original neuron, the inverse of `neuron_F`."""
        block_F = torch.empty_like(self.neuron_F)
        block_F[self.neuron_F] = torch.arange(self.neuron_F.numel(), device=block_F.device) // self.block_size
        return block_F

    def dense_ffn(self, start: int = 0, stop: int | None = None) -> DenseFFN:
        """Blocks start..stop-1 (all by default) seen as one dense FFN: views, no copies; gradients reach the parameters."""
        blocks = slice(start, self.num_blocks if stop is None else stop)
        gate_BSD, gate_bias_BS, up_bias_BS = self.gate_BSD, self.gate_bias_BS, self.up_bias_BS
        return DenseFFN(
            gate_FD=None if gate_BSD is None else gate_BSD[blocks].flatten(0, 1),
            up_FD=self.up_BSD[blocks].flatten(0, 1),
            down_FD=self.down_BSD[blocks].flatten(0, 1),
            gate_bias_F=None if gate_bias_BS is None else gate_bias_BS[blocks].flatten(),
            up_bias_F=None if up_bias_BS is None else up_bias_BS[blocks].flatten(),
            down_bias_D=self.down_bias_D,
            activation=self.activation,
            dropout=self.dropout,
        )

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        kind = "gated" if self.gated else "plain"
        return f"num_blocks={self.num_blocks}, block_size={self.block_size}, dim={self.dim}, {kind} {self.activation}"


def block_order(block_F: Tensor) -> tuple[Tensor, int]:
    """`(neuron_F, num_blocks)`: the neurons sorted by (block, neuron). ValueError if blocks differ in size."""
    counts_B = torch.bincount(block_F.cpu())
    if counts_B.min() != counts_B.max():
        sizes = sorted(set(counts_B.tolist()))
        raise ValueError(f"block_F cuts blocks of {sizes} neurons; all blocks must have the same size.")
    return block_F.argsort(stable=True), counts_B.numel()


def _rows(rows_F: Tensor | None, neuron_F: Tensor, num_blocks: int) -> nn.Parameter | None:
    if rows_F is None:
        return None
    picked_F = rows_F.detach().index_select(0, neuron_F.to(rows_F.device))
    return nn.Parameter(picked_F.unflatten(0, (num_blocks, -1)))


def _copy(bias_D: Tensor | None) -> nn.Parameter | None:
    return None if bias_D is None else nn.Parameter(bias_D.detach().clone())
