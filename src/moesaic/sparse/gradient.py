"""Partitions by gradient: a block holds the neurons that matter most to one kind of text.

Source: arXiv:2406.16554 sec. 3.1 and github.com/pjlab-sys4nlp/llama-moe (`gradient` splits independent and
sharing_inter). Differs: the kinds of text are clusters of calibration windows by their mean FFN input.
Shapes: T tokens, D model dim, F neurons, B blocks, S = F / B, C clusters of windows, W windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.kmeans import kmeans
from moesaic.sparse.partition import Partition
from moesaic.sparse.stats import NeuronStats

__all__ = ["Gradient", "greedy_blocks", "shared_neurons"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradient(Partition):
    """One block per cluster of text, filled greedily with the neurons of the largest |h dL/dh| there.

    The first `always` blocks hold the neurons that matter to all clusters: for a selection that keeps them always on.
    Raises ValueError unless 0 <= always < num_blocks, or, in `labels`, with fewer windows than clusters.
    """

    always: int = 0

    needs_stats: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Partition.__post_init__(self)
        if not 0 <= self.always < self.num_blocks:
            raise ValueError(
                f"partition.always={self.always} leaves no block to route to (allowed: 0..{self.num_blocks - 1})"
            )

    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        assert stats is not None
        assert stats.window_T is not None
        num_clusters, size = self.num_blocks - self.always, ffn.width // self.num_blocks
        cluster_T = window_clusters(stats.x_TD, stats.window_T, num_clusters, generator=generator)
        importance_CF = stats.gradient_importance(cluster_T, num_clusters).cpu()
        block_F = torch.full((ffn.width,), -1)
        shared = shared_neurons(importance_CF, self.always * size)
        block_F[shared] = torch.arange(len(shared)) // size
        others = (block_F < 0).nonzero()[:, 0]
        block_F[others] = self.always + greedy_blocks(importance_CF[:, others])
        return block_F


def window_clusters(x_TD: Tensor, window_T: Tensor, num_clusters: int, *, generator: Generator) -> Tensor:
    """int64 (T,): the cluster of each token's window, by k-means of the windows' mean inputs.

    Raises ValueError with fewer windows than clusters.
    """
    counts_W = torch.bincount(window_T)
    if len(counts_W) < num_clusters:
        raise ValueError(
            f"{len(counts_W)} calibration windows cannot tell {num_clusters} kinds of text apart. Raise "
            "method.calibration_tokens, or cut fewer blocks."
        )
    sum_WD = torch.zeros(len(counts_W), x_TD.shape[1]).index_add_(0, window_T, x_TD.detach().float().cpu())
    return kmeans(sum_WD / counts_W.clamp(min=1)[:, None], num_clusters, generator=generator)[window_T]


def shared_neurons(importance_CF: Tensor, count: int) -> Tensor:
    """int64: the `count` neurons whose share of a cluster's importance is largest in the cluster where it is least."""
    share_CF = importance_CF / importance_CF.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return share_CF.amin(dim=0).argsort(descending=True, stable=True)[:count]


def greedy_blocks(importance_CF: Tensor) -> Tensor:
    """int64 (F,): equal blocks, one per cluster, by taking the largest importance left whose block is not yet full."""
    num_clusters, width = importance_CF.shape
    room = [width // num_clusters] * num_clusters
    block_F = [-1] * width
    for flat in importance_CF.flatten().argsort(descending=True, stable=True).tolist():
        cluster, neuron = divmod(flat, width)
        if block_F[neuron] < 0 and room[cluster]:
            block_F[neuron] = cluster
            room[cluster] -= 1
    return torch.tensor(block_F)
