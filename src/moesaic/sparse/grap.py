"""GrAP: fixed orthogonal directions, one per block, and the cosine of the token with each; nothing to train.

Source: arXiv:2406.00023 (Expert-Token Resonance) eq. 2-4, on grouped average pooling; arXiv:2401.13920 (LocMoE)
eq. 1-4 for `relu_mean`. Differs: other groups than contiguous ones, the learned control, and noise-free logits
(the paper does not say what its epsilon is) are ours.
Shapes: T tokens, D model dim, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor, nn

from moesaic.sparse.experts import Experts
from moesaic.sparse.precision import full_precision
from moesaic.sparse.routing import Routing
from moesaic.sparse.score import JointScoreModule, Score, ScoreModule
from moesaic.sparse.select import RoutingContext, Selection

__all__ = ["Grap", "GroupMap", "LearnedCos", "cosines", "group_cosines", "group_directions", "group_order"]

GroupMap = Literal["contiguous", "strided", "permutation", "rotation"]

_SMALLEST_LENGTH = 1e-6  # floor of |x|: padding scores 0
_DRAW = 2406_00023  # seeds permutation and rotation, so that a partition and a score speak of the same groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Grap(Score):
    """The cosine of x with w_b, which is constant on the b-th group of D/B input dimensions and 0 elsewhere.

    `group_map`: a group is D/B neighbours, every B-th dimension, D/B random ones (permutation), or the w_b are random
    orthogonal directions instead (rotation); the random ones are the same in every layer.
    `logits`: cosine, or LocMoE's relu_mean: ReLU of the group's mean. Weights are made of those; the selection is
    given the ReLU of the cosines, which orders a token's blocks alike and which capacity bounds are about.
    """

    group_map: GroupMap = "contiguous"
    logits: Literal["cosine", "relu_mean"] = "cosine"

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        """Raises ValueError where B groups of equal size cannot be made of D dimensions."""
        _check_groups(dim, num_blocks)
        kind = _GrapModule if self.logits == "cosine" else _ReluMeanModule
        return kind(self, dim, num_blocks)

    def affinity(self, x_TD: Tensor, num_blocks: int) -> Tensor:
        """float32 (T, B) cosines, before any layer exists."""
        return cosines(x_TD, group_directions(x_TD.shape[1], num_blocks, self.group_map).to(x_TD.device))


class _GrapModule(ScoreModule):
    """Holds which dimensions form a group, or the rotated directions; neither where groups are contiguous."""

    config: Grap
    order_D: Tensor | None
    direction_BD: Tensor | None

    def __init__(self, config: Grap, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        self.num_blocks = num_blocks
        rotated, shuffled = config.group_map == "rotation", config.group_map in ("strided", "permutation")
        self.register_buffer("order_D", torch.zeros(dim, dtype=torch.int64) if shuffled else None)
        self.register_buffer("direction_BD", torch.zeros(num_blocks, dim) if rotated else None)

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        with full_precision(x_TD.device):
            if self.direction_BD is not None:
                return cosines(x_TD, self.direction_BD.float())
            return group_cosines(x_TD if self.order_D is None else x_TD[:, self.order_D], self.num_blocks)

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        if self.order_D is not None:
            self.order_D.copy_(group_order(experts.dim, self.num_blocks, self.config.group_map))
        if self.direction_BD is not None:
            self.direction_BD.copy_(group_directions(experts.dim, self.num_blocks, self.config.group_map))


class _ReluMeanModule(_GrapModule, JointScoreModule):
    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        cosine_TB = super().forward(x_TD, experts)
        return (cosine_TB * _lengths(x_TD) * (self.num_blocks / x_TD.shape[1]) ** 0.5).relu()

    def route(
        self, x_TD: Tensor, experts: Experts, select: Selection, context: RoutingContext
    ) -> tuple[Routing, Tensor]:
        return select(super().forward(x_TD, experts).relu(), context), self.forward(x_TD, experts)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedCos(Score):
    """The cosine of x with a learned direction per block; they start at those of `Grap`. The control for fixed ones."""

    group_map: GroupMap = "contiguous"

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        """Raises ValueError where B groups of equal size cannot be made of D dimensions."""
        _check_groups(dim, num_blocks)
        return _LearnedCosModule(self, dim, num_blocks)


class _LearnedCosModule(ScoreModule):
    config: LearnedCos

    def __init__(self, config: LearnedCos, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        self.weight_BD = nn.Parameter(torch.zeros(num_blocks, dim))

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        with full_precision(x_TD.device):
            return cosines(x_TD, nnf.normalize(self.weight_BD.float(), dim=1))

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        self.weight_BD.copy_(group_directions(experts.dim, experts.num_blocks, self.config.group_map))


def group_cosines(x_TD: Tensor, num_blocks: int) -> Tensor:
    """float32 (T, B): cosines with contiguous group directions, as group means: mean(x[group]) sqrt(D/B) / |x|."""
    mean_TB = x_TD.float().unflatten(1, (num_blocks, -1)).mean(dim=2)
    return mean_TB * (x_TD.shape[1] / num_blocks) ** 0.5 / _lengths(x_TD)


def cosines(x_TD: Tensor, direction_BD: Tensor) -> Tensor:
    """float32 (T, B): cosines with unit directions."""
    return nnf.linear(x_TD.float(), direction_BD) / _lengths(x_TD)


def group_order(dim: int, num_blocks: int, group_map: GroupMap) -> Tensor:
    """int64 (D,): the dimensions, group after group. ValueError for rotation, whose directions are no groups."""
    if group_map == "rotation":
        raise ValueError("group_map=rotation has directions, but no groups of dimensions.")
    if group_map == "strided":
        return torch.arange(dim).view(-1, num_blocks).t().flatten()
    return _permutation(dim) if group_map == "permutation" else torch.arange(dim)


def group_directions(dim: int, num_blocks: int, group_map: GroupMap) -> Tensor:
    """float32 (B, D): orthonormal, on the CPU; the same for equal arguments."""
    if group_map == "rotation":
        generator = torch.Generator().manual_seed(_DRAW)
        drawn_DB = torch.randn(dim, num_blocks, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn_DB).Q.t().float().contiguous()
    size = dim // num_blocks
    group_D = torch.empty(dim, dtype=torch.int64)
    group_D[group_order(dim, num_blocks, group_map)] = torch.arange(dim) // size
    return nnf.one_hot(group_D, num_blocks).t().float() * size**-0.5


def _permutation(dim: int) -> Tensor:
    return torch.randperm(dim, generator=torch.Generator().manual_seed(_DRAW))


def _lengths(x_TD: Tensor) -> Tensor:
    return x_TD.float().norm(dim=1, keepdim=True).clamp(min=_SMALLEST_LENGTH)


def _check_groups(dim: int, num_blocks: int) -> None:
    if dim % num_blocks:
        near = [n for n in range(1, dim + 1) if dim % n == 0 and n != num_blocks]
        near = sorted(near, key=lambda n: abs(n - num_blocks))[:2]
        raise ValueError(
            f"partition.num_blocks={num_blocks} does not divide the model dim {dim}, so grouped average pooling has no "
            f"equal groups (nearest that fit: {', '.join(map(str, sorted(near)))}). Use one of these."
        )
