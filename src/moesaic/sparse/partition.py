"""Partitions: which neurons form which block.

A new way to cut is a frozen dataclass that derives from `Partition` and is named by `_target_`. One label vector
serves gate, up and down rows, so all blocks together are always the dense FFN.
Source: arXiv:2110.01786 sec. 3.2 (random, k-means, co-activation); arXiv:2408.11855 (contiguous).
Shapes: F neurons, D model dim, B blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.coactivation import metis_blocks, spectral_blocks
from moesaic.sparse.kmeans import balanced_kmeans, constrained_kmeans, unit_rows
from moesaic.sparse.stats import NeuronStats

__all__ = [
    "BalancedKMeans",
    "BlocksOfSize",
    "CoActivation",
    "Contiguous",
    "Importance",
    "Partition",
    "Random",
    "check_blocks",
    "neuron_rows",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition(ABC):
    """A way to cut the F neurons of an FFN into `num_blocks` blocks of equal size."""

    num_blocks: int

    needs_stats: ClassVar[bool] = False  # True: `labels` must be given NeuronStats, so calibration has to run first
    needs_gradients: ClassVar[bool] = False  # True: those NeuronStats must have `gradient_TD` and `window_T`

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(f"partition.num_blocks={self.num_blocks} is below 1")

    def check_width(self, width: int) -> None:
        """Raise ValueError, with the nearest numbers that work, if `width` neurons do not cut into equal blocks."""
        check_blocks(width, self.num_blocks)

    def for_width(self, width: int) -> Partition:
        """The same cut with its number of blocks decided for `width` neurons, which `check_width` did not refuse."""
        return self

    def labels(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        """int64 (F,) on the CPU: the block of each neuron, every block equally often; equal generators cut equally.

        Raises ValueError if the width does not fit, or if the partition needs `stats` (with gradients) and got none.
        """
        self.check_width(ffn.width)
        if self.needs_stats and stats is None:
            raise ValueError(f"{type(self).__name__} needs calibration inputs: set calibration_tokens above 0.")
        if self.needs_gradients and (stats is None or stats.gradient_TD is None):
            raise ValueError(
                f"{type(self).__name__} needs the loss gradient at each FFN, which this method does not compute. "
                "Use method._target_=moesaic.methods.llama_moe.LlamaMoE, or another partition."
            )
        block_F = self.cut(ffn, stats, generator=generator).cpu()
        num_blocks = self.for_width(ffn.width).num_blocks
        counts_B = torch.bincount(block_F, minlength=num_blocks)
        if block_F.shape != (ffn.width,) or not bool((counts_B == ffn.width // num_blocks).all()):
            raise ValueError(
                f"{type(self).__name__}.cut labelled {block_F.numel()} of {ffn.width} neurons in blocks of "
                f"{counts_B.tolist()}; every one of {num_blocks} blocks needs {ffn.width // num_blocks}."
            )
        return block_F

    @abstractmethod
    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        """int64 (F,) labels 0..B-1, equally often; width and stats were checked. Randomness is the generator's only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contiguous(Partition):
    """Block b is neurons b*S..(b+1)*S-1, in the order of the dense model. Source: FactorLLM, MoEfication's `random`."""

    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        return _blocks_of_order(torch.arange(ffn.width), self.num_blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlocksOfSize(Partition):
    """Blocks of `block_size` neurons in the order of the dense model, as many as it is wide; 1: each neuron a block.

    `num_blocks` is 0 until `for_width` decides it.
    """

    num_blocks: int = field(default=0, init=False)
    block_size: int

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"partition.block_size={self.block_size} is below 1")

    def check_width(self, width: int) -> None:
        check_blocks(width, self.block_size, name="block_size")

    def for_width(self, width: int) -> Partition:
        return Contiguous(num_blocks=width // self.block_size)

    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        return _blocks_of_order(torch.arange(ffn.width), ffn.width // self.block_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Random(Partition):
    """Blocks drawn at random from the generator. Source: arXiv:2406.16554 (the split that won there)."""

    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        return _blocks_of_order(torch.randperm(ffn.width, generator=generator), self.num_blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class BalancedKMeans(Partition):
    """Neurons with similar rows share a block: balanced k-means on L2-normalised rows.

    `rows` auto is the gate matrix of a gated FFN and the up matrix of a plain one. Solver exact is the published
    min-cost flow (minutes from some thousand neurons on); fast alternates an auction with new centroids.
    """

    rows: Literal["auto", "gate", "up", "down"] = "auto"
    solver: Literal["exact", "fast"] = "fast"

    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        solve = balanced_kmeans if self.solver == "fast" else constrained_kmeans
        return solve(unit_rows(neuron_rows(ffn, self.rows)), self.num_blocks, generator=generator).block_F


@dataclass(frozen=True, kw_only=True, slots=True)
class CoActivation(Partition):
    """Neurons that fire together share a block: the co-activation graph on calibration tokens, cut into equal parts.

    `counts` sum adds |h_i||h_j| over all tokens; clamped cuts the sum of every 8 tokens at 1, as released. Solver metis
    needs the optional package pymetis.
    """

    solver: Literal["spectral", "metis"] = "spectral"
    counts: Literal["sum", "clamped"] = "sum"

    needs_stats: ClassVar[bool] = True

    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        assert stats is not None
        weight_FF = stats.coactivation() if self.counts == "sum" else stats.clamped_coactivation()
        solve = spectral_blocks if self.solver == "spectral" else metis_blocks
        return solve(weight_FF, self.num_blocks, generator=generator)


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance(Partition):
    """Blocks in falling importance, so that blocks 0..e are the most important neurons of that width.

    `criterion` mean_abs is the mean of |h| on calibration tokens, mean_abs_output the same times the length of the
    neuron's down row, mean_abs_input the mean of |x . w| of the first linear layer alone (the gate of a gated FFN).
    Ties keep the dense model's order. Source of mean_abs_input: arXiv:2511.16664 eq. 2.
    """

    criterion: Literal["mean_abs", "mean_abs_output", "mean_abs_input"] = "mean_abs"

    needs_stats: ClassVar[bool] = True

    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        assert stats is not None
        importance_F = getattr(stats, self.criterion)()
        return _blocks_of_order(importance_F.cpu().argsort(descending=True, stable=True), self.num_blocks)


def check_blocks(width: int, parts: int, *, name: str = "num_blocks") -> None:
    """Raise ValueError, naming the setting, unless `width` neurons are a multiple of `parts` blocks (or neurons)."""
    if width % parts == 0:
        return
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    below = max(n for n in divisors if n < parts)
    near = [below, *[n for n in divisors if n > parts][:1]]
    problem = "exceeds" if parts > width else "does not divide"
    raise ValueError(
        f"partition.{name}={parts} {problem} the FFN width {width} (nearest that fit: "
        f"{', '.join(map(str, near))}). Use one of these."
    )


def neuron_rows(ffn: DenseFFN, rows: Literal["auto", "gate", "up", "down"]) -> Tensor:
    """(F, D): the matrix whose rows stand for the neurons. ValueError for gate in a plain FFN."""
    if rows == "auto":
        return ffn.up_FD if ffn.gate_FD is None else ffn.gate_FD
    if rows == "gate":
        if ffn.gate_FD is None:
            raise ValueError("rows=gate, but this FFN has no gate matrix. Use rows: auto, up or down.")
        return ffn.gate_FD
    return ffn.up_FD if rows == "up" else ffn.down_FD


def _blocks_of_order(order_F: Tensor, num_blocks: int) -> Tensor:
    """Labels that put the first F / B neurons of `order_F` into block 0, the next into block 1, and so on."""
    block_F = torch.empty_like(order_F)
    block_F[order_F] = torch.arange(len(order_F)) // (len(order_F) // num_blocks)
    return block_F
