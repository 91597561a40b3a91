"""Experts: the weights of a dense FFN, its neurons re-ordered so that each block is one contiguous slab.

Shapes: T tokens, D model dim, F neurons (B * S), B blocks, S neurons per block, R rows: the neurons of some blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from moesaic.ffn.dense import DenseFFN

__all__ = ["BlockRows", "Experts", "ExpertsShape", "block_order"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsShape:
    """Everything about `Experts` but the numbers: what a saved config holds, so that weights can be loaded into it.

    Raises ValueError for sizes below 1 and for a gate bias without a gate.
    """

    num_blocks: int
    block_size: int
    dim: int
    activation: str
    gated: bool
    gate_bias: bool = False
    up_bias: bool = False
    down_bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.activation not in ACT2FN:
            raise ValueError(f"activation={self.activation!r} is none of {', '.join(sorted(ACT2FN))}")
        if self.gate_bias and not self.gated:
            raise ValueError("gate_bias=True needs gated=True: a plain FFN has its bias in up_bias")


class BlockRows(NamedTuple):
    """The weights of some blocks, one row per neuron; for all neurons of an FFN, R is F."""

    gate_RD: Tensor | None
    up_RD: Tensor
    down_RD: Tensor
    gate_bias_R: Tensor | None
    up_bias_R: Tensor | None


class Experts(nn.Module):
    """The blocks of one FFN: parameters `gate_BSD` (None for a plain FFN), `up_BSD`, `down_BSD`, and biases or None.

    Row s of block b is original neuron `neuron_F[b * S + s]` (a buffer, so it is saved with the weights).
    `down_bias_D` is the output bias, added once per token by the layer and never by an executor. `dropout` is the
    fraction that the replaced FFN drops in training.
    """

    gate_BSD: nn.Parameter | None
    up_BSD: nn.Parameter
    down_BSD: nn.Parameter
    gate_bias_BS: nn.Parameter | None
    up_bias_BS: nn.Parameter | None
    down_bias_D: nn.Parameter | None
    neuron_F: Tensor

    def __init__(self, shape: ExpertsShape) -> None:
        """Weights of this shape at zero, to load others into; `from_dense` makes useful ones."""
        super().__init__()
        size_BS = (shape.num_blocks, shape.block_size)
        size_BSD = (*size_BS, shape.dim)
        self.gate_BSD = _zeros(size_BSD) if shape.gated else None
        self.up_BSD = _zeros(size_BSD)
        self.down_BSD = _zeros(size_BSD)
        self.gate_bias_BS = _zeros(size_BS) if shape.gate_bias else None
        self.up_bias_BS = _zeros(size_BS) if shape.up_bias else None
        self.down_bias_D = _zeros((shape.dim,)) if shape.down_bias else None
        self.register_buffer("neuron_F", torch.arange(shape.num_blocks * shape.block_size))
        self.activation = shape.activation
        self.act = ACT2FN[shape.activation]
        self.dropout = shape.dropout

    @classmethod
    def from_dense(cls, ffn: DenseFFN, block_F: Tensor) -> Experts:
        """Copy `ffn` into the blocks that `block_F` (int64, block of each neuron, every block equally often) cuts.

        Works on meta tensors. Raises ValueError if `block_F` has the wrong length or its blocks differ in size.
        """
        if block_F.numel() != ffn.width:
            raise ValueError(f"block_F labels {block_F.numel()} neurons, but the FFN has {ffn.width}")
        neuron_F, num_blocks = block_order(block_F)
        with torch.device("meta"):  # the weights are assigned below: no second allocation
            experts = cls(_shape_of(ffn, num_blocks))
        for name in ("gate", "up", "down"):
            setattr(experts, f"{name}_BSD", _blocks(getattr(ffn, f"{name}_FD"), neuron_F, num_blocks))
        for name in ("gate", "up"):
            setattr(experts, f"{name}_bias_BS", _blocks(getattr(ffn, f"{name}_bias_F"), neuron_F, num_blocks))
        experts.down_bias_D = None if ffn.down_bias_D is None else nn.Parameter(ffn.down_bias_D.detach().clone())
        experts.neuron_F = neuron_F.to(ffn.up_FD.device)
        return experts

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

    @property
    def shape(self) -> ExpertsShape:
        """What `Experts(shape)` needs to hold these weights."""
        return ExpertsShape(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            dim=self.dim,
            activation=self.activation,
            gated=self.gated,
            gate_bias=self.gate_bias_BS is not None,
            up_bias=self.up_bias_BS is not None,
            down_bias=self.down_bias_D is not None,
            dropout=self.dropout,
        )

    def block_of_neuron(self) -> Tensor:
        """int64 (F,): the block of each original neuron, the inverse of `neuron_F`."""
        return (self.neuron_F.argsort() // self.block_size).to(torch.int64)

    def rows(self, start: int = 0, stop: int | None = None) -> BlockRows:
        """Blocks start..stop-1 (all by default) as rows: views, no copies."""
        return self._rows(lambda w: w[start:stop].flatten(0, 1))

    def rows_by_block(self) -> list[BlockRows]:
        """The rows of each block: views. One unbind per weight, so that backward does not grow as B squared."""
        weights = (self.gate_BSD, self.up_BSD, self.down_BSD, self.gate_bias_BS, self.up_bias_BS)
        columns = [[None] * self.num_blocks if w is None else w.unbind(0) for w in weights]
        return [BlockRows(*rows) for rows in zip(*columns, strict=True)]

    def copy_rows(self, block_U: Tensor) -> BlockRows:
        """The rows of the blocks `block_U` (int64), copied together in that order."""
        return self._rows(lambda w: w.index_select(0, block_U).flatten(0, 1))

    def hidden(self, x_TD: Tensor, rows: BlockRows) -> Tensor:
        """Hidden units (T, R) of `rows`, what `project` multiplies with."""
        up_TR = F.linear(x_TD, rows.up_RD, rows.up_bias_R)
        if rows.gate_RD is None:
            return self.act(up_TR)
        return self.act(F.linear(x_TD, rows.gate_RD, rows.gate_bias_R)) * up_TR

    def project(self, h_TR: Tensor, rows: BlockRows) -> Tensor:
        """`h_TR @ down_RD` (T, D), without the output bias."""
        return self.as_down(h_TR) @ rows.down_RD

    def as_down(self, h: Tensor) -> Tensor:
        """`h` in the dtype that the down matrix wants: T5 keeps its own in float32 when the rest is half precision."""
        if h.dtype == self.down_BSD.dtype or torch.is_autocast_enabled(h.device.type):
            return h
        return h.to(self.down_BSD.dtype)

    def dense_ffn(self, start: int = 0, stop: int | None = None) -> DenseFFN:
        """Blocks start..stop-1 (all by default) seen as one dense FFN, output bias included: views, no copies."""
        rows = self.rows(start, stop)
        return DenseFFN(
            gate_FD=rows.gate_RD,
            up_FD=rows.up_RD,
            down_FD=rows.down_RD,
            gate_bias_F=rows.gate_bias_R,
            up_bias_F=rows.up_bias_R,
            down_bias_D=self.down_bias_D,
            activation=self.activation,
            dropout=self.dropout,
        )

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        kind = "gated" if self.gated else "plain"
        return f"num_blocks={self.num_blocks}, block_size={self.block_size}, dim={self.dim}, {kind}"

    def _rows(self, pick: Callable[[Tensor], Tensor]) -> BlockRows:
        return BlockRows(
            gate_RD=None if self.gate_BSD is None else pick(self.gate_BSD),
            up_RD=pick(self.up_BSD),
            down_RD=pick(self.down_BSD),
            gate_bias_R=None if self.gate_bias_BS is None else pick(self.gate_bias_BS),
            up_bias_R=None if self.up_bias_BS is None else pick(self.up_bias_BS),
        )


def block_order(block_F: Tensor) -> tuple[Tensor, int]:
    """`(neuron_F, num_blocks)`: the neurons sorted by (block, neuron). ValueError if blocks differ in size."""
    counts_B = torch.bincount(block_F.cpu())
    sizes = sorted(set(counts_B.tolist()))
    if len(sizes) != 1:
        raise ValueError(f"block_F cuts blocks of {sizes} neurons; all blocks must have the same size")
    return block_F.argsort(stable=True), counts_B.numel()


def _shape_of(ffn: DenseFFN, num_blocks: int) -> ExpertsShape:
    return ExpertsShape(
        num_blocks=num_blocks,
        block_size=ffn.width // num_blocks,
        dim=ffn.dim,
        activation=ffn.activation,
        gated=ffn.gated,
        gate_bias=ffn.gate_bias_F is not None,
        up_bias=ffn.up_bias_F is not None,
        down_bias=ffn.down_bias_D is not None,
        dropout=ffn.dropout,
    )


def _zeros(size: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size))


def _blocks(rows_F: Tensor | None, neuron_F: Tensor, num_blocks: int) -> nn.Parameter | None:
    if rows_F is None:
        return None
    picked_F = rows_F.detach().index_select(0, neuron_F.to(rows_F.device))
    return nn.Parameter(picked_F.unflatten(0, (num_blocks, -1)))
