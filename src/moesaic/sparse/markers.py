"""CMoE's carving: neurons that fire for the same tokens form a block, and one neuron of each stands for it in routing.

A marker says that a neuron is among the most active of a token, both seen by direction only.
Source: arXiv:2502.04416 and github.com/JarvisPei/CMoE. Differs: every layer sees the inputs of the dense model, not
of the model with earlier layers carved; biases of an FFN, which the published models lack, do not mark.
Shapes: T tokens, D model dim, F neurons, B blocks, S neurons per block, M some neurons, C clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as nnf
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.experts import Experts
from moesaic.sparse.kmeans import unit_rows
from moesaic.sparse.partition import Partition
from moesaic.sparse.precision import full_precision
from moesaic.sparse.score import Score, ScoreModule
from moesaic.sparse.stats import NeuronStats, hidden_chunks

__all__ = ["CoreNeuron", "Markers", "activation_markers", "balanced_clusters", "core_neurons", "marker_distances"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Markers(Partition):
    """Blocks 0..shared-1 are the neurons marked most often; the others are equal clusters of neurons marked together.

    A token marks its `markers_per_token` most active neurons. The assignment of neurons to clusters takes 8 F^2 bytes.
    Raises ValueError unless 0 <= shared < num_blocks and at least one neuron is marked.
    """

    shared: int = 0
    markers_per_token: int = 10

    needs_stats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Partition.__post_init__(self)
        if not 0 <= self.shared < self.num_blocks:
            raise ValueError(
                f"partition.shared={self.shared} is outside 0..{self.num_blocks - 1}: with num_blocks="
                f"{self.num_blocks}, at least one block must be left to route to."
            )
        _check_markers(self.markers_per_token)

    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        assert stats is not None
        marker_TF = activation_markers(ffn, stats.x_TD, self.markers_per_token)
        order_F = marker_TF.float().mean(0).argsort(descending=True, stable=True)
        size = ffn.width // self.num_blocks
        shared_F, routed_F = order_F[: size * self.shared], order_F[size * self.shared :]
        block_F = torch.empty_like(order_F)
        block_F[shared_F] = torch.arange(len(shared_F), device=block_F.device) // size
        # The routed neurons come most active first, so the first ones are the starting centroids.
        cluster_M = balanced_clusters(marker_TF[:, routed_F], self.num_blocks - self.shared)
        block_F[routed_F] = self.shared + cluster_M.to(block_F.device)
        return block_F


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreNeuron(Score):
    """|h| of the block's core neuron, with gate and up row scaled to length 1 and x as it is; nothing to train.

    The core neuron is the one whose markers are nearest to the block's mean. Source: arXiv:2502.04416. Differs: no
    softmax over the blocks, which changes no choice and, with weight 1, nothing else.
    """

    markers_per_token: int = 10

    def __post_init__(self) -> None:
        _check_markers(self.markers_per_token)

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _CoreNeuronModule(self, dim, num_blocks)


class _CoreNeuronModule(ScoreModule):
    config: CoreNeuron
    gate_BD: Tensor
    up_BD: Tensor

    def __init__(self, config: CoreNeuron, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        self.register_buffer("gate_BD", torch.zeros(num_blocks, dim))
        self.register_buffer("up_BD", torch.zeros(num_blocks, dim))

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        with full_precision(x_TD.device):
            x_TD = x_TD.float()
            up_TB = nnf.linear(x_TD, self.up_BD.float())
            if not experts.gated:
                return experts.act(up_TB).abs()
            return (experts.act(nnf.linear(x_TD, self.gate_BD.float())) * up_TB).abs()

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        if x_TD is None:
            raise ValueError("CoreNeuron needs calibration inputs: set calibration_tokens above 0.")
        ffn = experts.dense_ffn()
        marker_TF = activation_markers(ffn, x_TD, self.config.markers_per_token)
        core_B = core_neurons(marker_TF.unflatten(1, (experts.num_blocks, experts.block_size)))
        self.up_BD.copy_(unit_rows(ffn.up_FD[core_B]))
        if ffn.gate_FD is not None:
            self.gate_BD.copy_(unit_rows(ffn.gate_FD[core_B]))


@torch.no_grad()
def activation_markers(ffn: DenseFFN, x_TD: Tensor, markers_per_token: int) -> Tensor:
    """Boolean (T, F): each token's neurons of largest |h|, with x and the rows of the neurons scaled to length 1."""
    unit = DenseFFN(
        gate_FD=None if ffn.gate_FD is None else unit_rows(ffn.gate_FD),
        up_FD=unit_rows(ffn.up_FD),
        down_FD=ffn.down_FD,
        activation=ffn.activation,
    )
    marked = []
    for h_TF in hidden_chunks(unit, nnf.normalize(x_TD.float(), dim=1)):
        best_TK = h_TF.abs().topk(min(markers_per_token, ffn.width), dim=1).indices
        marked.append(torch.zeros_like(h_TF, dtype=torch.bool).scatter(1, best_TK, True))
    return torch.cat(marked)


def balanced_clusters(marker_TM: Tensor, num_clusters: int) -> Tensor:
    """int64 (M,): equal clusters with the least summed distance to the markers of the first `num_clusters` neurons."""
    distance_MC = marker_distances(marker_TM, marker_TM[:, :num_clusters])
    size = marker_TM.shape[1] // num_clusters
    # Every cluster is a column for each neuron that it has room for.
    _, column_M = linear_sum_assignment(distance_MC.double().repeat_interleave(size, dim=1).cpu().numpy())
    return torch.from_numpy(column_M) // size


def core_neurons(marker_TBS: Tensor) -> Tensor:
    """int64 (B,): the neuron b * S + s of each block whose markers are nearest to the block's mean, first on ties."""
    _, num_blocks, size = marker_TBS.shape
    nearest = [
        marker_distances(marker_TS, marker_TS.float().mean(1, keepdim=True))[:, 0].argmin()
        for marker_TS in marker_TBS.unbind(1)
    ]
    return torch.stack(nearest) + size * torch.arange(num_blocks, device=marker_TBS.device)


def marker_distances(marker_TM: Tensor, centroid_TC: Tensor) -> Tensor:
    """float32 (M, C): sum over tokens of |marker - centroid|, for markers in {0, 1} and centroids in 0..1."""
    marker_TM, centroid_TC = marker_TM.float(), centroid_TC.float()
    return marker_TM.sum(0)[:, None] + centroid_TC.sum(0) - 2 * marker_TM.mT @ centroid_TC


def _check_markers(markers_per_token: int) -> None:
    if markers_per_token < 1:
        raise ValueError(f"markers_per_token={markers_per_token} is below 1, the neurons that a token marks")
