"""Scores: how much each token wants each block, in float32 whatever the model's dtype or autocast says.

A new score is a frozen dataclass that derives from `Score` and builds a `ScoreModule`. Modules start at zero: the
weights come from `initialise` (data and an explicit generator) or from a checkpoint.
Source: arXiv:2110.01786 sec. 3.3 (TanhMLP, Centroid, Oracle: its MLP, similarity and groundtruth selection);
arXiv:2408.11855 (Linear with bias). Shapes: T tokens, D model dim, B blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor, nn

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.experts import Experts
from moesaic.sparse.kmeans import unit_rows
from moesaic.sparse.labels import best_subset, block_grams, singleton_gains
from moesaic.sparse.partition import neuron_rows
from moesaic.sparse.precision import full_precision
from moesaic.sparse.routing import Routing
from moesaic.sparse.select import AllBlocks, RoutingContext, Selection, TopK
from moesaic.sparse.targets import Target, expert_targets

__all__ = [
    "Centroid",
    "JointScoreModule",
    "Linear",
    "Oracle",
    "RandomScore",
    "Score",
    "ScoreModule",
    "SubsetOracle",
    "TanhMLP",
    "block_centroids",
]

_TURNS = 64.0  # wraps of a random score while x / ||x|| moves by 1: tokens that differ a little look independent


@dataclass(frozen=True, kw_only=True, slots=True)
class Score(ABC):
    """A way to score blocks; `activation` makes scores of the logits (softmax is over all blocks)."""

    activation: Literal["identity", "sigmoid", "softmax"] = "identity"

    def for_ffn(self, ffn: DenseFFN) -> Score:
        """The same score with its `auto` settings decided for `ffn`, as `build` needs it."""
        return self

    def num_scores(self, num_blocks: int) -> int:
        """How many scores a token gets: one for each block, unless the score judges something else."""
        return num_blocks

    @abstractmethod
    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        """The module for one layer, weights at zero."""


class ScoreModule(nn.Module, ABC):
    """The score of one layer; `config` is the component that built it."""

    config: Score
    is_first_product: ClassVar[bool] = False  # True: the FFN's own gate (else up) product, which blocks do not repeat

    def __init__(self, config: Score) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        """float32 logits (T, B) of the FFN inputs `x_TD`; only oracles look at `experts`."""

    def activate(self, logits_TB: Tensor) -> Tensor:
        """float32 scores (T, B) of the logits."""
        if self.config.activation == "sigmoid":
            return logits_TB.float().sigmoid()
        if self.config.activation == "softmax":
            return logits_TB.float().softmax(dim=1)
        return logits_TB.float()

    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        """Set the starting weights from the experts, calibration inputs (None: there are none) and `generator`."""


class JointScoreModule(ScoreModule):
    """A score that judges sets of blocks rather than blocks, and so chooses the routing itself."""

    @abstractmethod
    def route(
        self, x_TD: Tensor, experts: Experts, select: Selection, context: RoutingContext
    ) -> tuple[Routing, Tensor]:
        """The routing (weight 1) that `select` asks for, and float32 logits (T, B).

        Raises ValueError for a selection whose number of blocks depends on scores.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(Score):
    """One linear layer on x. `init`: uniform in +-1/sqrt(D), PyTorch's default, or zero. Source: arXiv:2408.11855."""

    bias: bool = True
    init: Literal["uniform", "zero"] = "uniform"

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _LinearModule(self, dim, num_blocks)


class _LinearModule(ScoreModule):
    config: Linear

    def __init__(self, config: Linear, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        self.weight_BD = nn.Parameter(torch.zeros(num_blocks, dim))
        self.bias_B = nn.Parameter(torch.zeros(num_blocks)) if config.bias else None

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        with full_precision(x_TD.device):
            bias_B = None if self.bias_B is None else self.bias_B.float()
            return nnf.linear(x_TD.float(), self.weight_BD.float(), bias_B)

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        if self.config.init == "zero":
            return
        bound = experts.dim**-0.5
        _fill_uniform(self.weight_BD, bound, generator)
        if self.bias_B is not None:
            _fill_uniform(self.bias_B, bound, generator)


@dataclass(frozen=True, kw_only=True, slots=True)
class TanhMLP(Score):
    """W2 tanh(W1 x), no biases, on x / ||x|| where `normalise_input` is true.

    `init` centroid starts with W1 = the mean of each block's L2-normalised `rows` (auto: gate rows of a gated FFN, else
    up rows) and W2 = identity; on raw x, W1 is scaled by 1 / mean ||x|| of the calibration inputs. `normalise_input`
    auto is true only where x / ||x|| ranks blocks as x does: a plain ReLU FFN without bias.
    Source: arXiv:2110.01786 sec. 3.3. Differs: raw x.
    """

    init: Literal["centroid", "random"] = "centroid"
    normalise_input: bool | Literal["auto"] = "auto"
    rows: Literal["auto", "gate", "up"] = "auto"

    def for_ffn(self, ffn: DenseFFN) -> TanhMLP:
        if self.normalise_input != "auto":
            return self
        homogeneous = not ffn.gated and ffn.activation == "relu" and ffn.up_bias_F is None
        return replace(self, normalise_input=homogeneous)

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        if self.normalise_input == "auto":
            raise ValueError("score.normalise_input=auto depends on the FFN: call for_ffn(ffn) before build.")
        return _TanhMLPModule(self, dim, num_blocks)


class _TanhMLPModule(ScoreModule):
    config: TanhMLP

    def __init__(self, config: TanhMLP, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        self.in_BD = nn.Parameter(torch.zeros(num_blocks, dim))
        self.out_BB = nn.Parameter(torch.zeros(num_blocks, num_blocks))

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        with full_precision(x_TD.device):
            x_TD = _directions(x_TD) if self.config.normalise_input else x_TD.float()
            return nnf.linear(nnf.linear(x_TD, self.in_BD.float()).tanh(), self.out_BB.float())

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        if self.config.init == "random":
            _fill_uniform(self.in_BD, experts.dim**-0.5, generator)
            _fill_uniform(self.out_BB, experts.num_blocks**-0.5, generator)
            return
        self.in_BD.copy_(block_centroids(experts, self.config.rows))
        self.out_BB.copy_(torch.eye(experts.num_blocks))
        if not self.config.normalise_input:
            if x_TD is None or not len(x_TD):
                raise ValueError("score.init=centroid on raw x needs calibration inputs: set calibration_tokens > 0.")
            self.in_BD.div_(x_TD.float().norm(dim=1).mean().clamp(min=1e-12).to(self.in_BD.device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Centroid(Score):
    """Minus the distance of x / ||x|| to the mean of the block's L2-normalised `rows`; nothing to train.

    Source: arXiv:2110.01786 sec. 3.3 (parameter similarity).
    """

    rows: Literal["auto", "gate", "up"] = "auto"

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _CentroidModule(self, dim, num_blocks)


class _CentroidModule(ScoreModule):
    config: Centroid
    centroid_BD: Tensor

    def __init__(self, config: Centroid, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        self.register_buffer("centroid_BD", torch.zeros(num_blocks, dim))

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        with full_precision(x_TD.device):
            x_TD, centroid_BD = _directions(x_TD), self.centroid_BD.float()
            squared_TB = torch.addmm(centroid_BD.square().sum(1), x_TD, centroid_BD.T, alpha=-2.0)
            squared_TB = squared_TB + x_TD.square().sum(1, keepdim=True)
            return -squared_TB.clamp(min=1e-12).sqrt()

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        self.centroid_BD.copy_(block_centroids(experts, self.config.rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class Oracle(Score):
    """What each block really does for the token (see `targets`): reads all experts, so an upper bound and no speed-up.

    Source: arXiv:2110.01786 sec. 3.3 (groundtruth selection).
    """

    target: Target

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _OracleModule(self)


class _OracleModule(ScoreModule):
    config: Oracle

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        return expert_targets(experts, x_TD, self.config.target)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubsetOracle(Score):
    """The set of k blocks whose scaled sum is nearest to the dense output, chosen jointly: the tightest upper bound.

    Works with TopK and AllBlocks. `scale` is the s of y = s * sum. Source: ours, through arXiv:2408.11855's labels.
    """

    scale: float = 1.0

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _SubsetOracleModule(self)


class _SubsetOracleModule(JointScoreModule):
    config: SubsetOracle

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        return singleton_gains(block_grams(experts, x_TD), self.config.scale)

    def route(
        self, x_TD: Tensor, experts: Experts, select: Selection, context: RoutingContext
    ) -> tuple[Routing, Tensor]:
        if not isinstance(select, TopK | AllBlocks):
            raise ValueError(f"SubsetOracle needs a fixed k, but select is {type(select).__name__}. Use TopK.")
        if isinstance(select, TopK) and select.always:
            raise ValueError(f"SubsetOracle chooses every block, but select.always={select.always}. Use Oracle.")
        k = select.k if isinstance(select, TopK) else experts.num_blocks
        gram_TBB = block_grams(experts, x_TD)
        routing = Routing.from_mask(best_subset(gram_TBB, k, self.config.scale))
        return routing, singleton_gains(gram_TBB, self.config.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomScore(Score):
    """Uniform scores that tell nothing: the random_router control, at the cost of a linear router.

    A score is the fractional part of a steep random projection of x / ||x||. So each token draws afresh, any block is
    as likely as any other, and the same input is routed alike by every executor, batch and process.
    """

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _RandomModule(self, dim, num_blocks)


class _RandomModule(ScoreModule):
    projection_BD: Tensor
    phase_B: Tensor

    def __init__(self, config: RandomScore, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        self.register_buffer("projection_BD", torch.zeros(num_blocks, dim))
        self.register_buffer("phase_B", torch.zeros(num_blocks))

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        with full_precision(x_TD.device):
            turns_TB = nnf.linear(_directions(x_TD), self.projection_BD.float(), self.phase_B.float())
            return turns_TB - turns_TB.floor()

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        self.projection_BD.copy_(_TURNS * torch.randn(self.projection_BD.shape, generator=generator))
        self.phase_B.copy_(torch.rand(self.phase_B.shape, generator=generator))


def block_centroids(experts: Experts, rows: Literal["auto", "gate", "up"] = "auto") -> Tensor:
    """float32 (B, D): the mean of each block's L2-normalised rows (auto: gate rows of a gated FFN, else up rows)."""
    row_FD = unit_rows(neuron_rows(experts.dense_ffn(), rows))
    return row_FD.unflatten(0, (experts.num_blocks, experts.block_size)).mean(1)


def _directions(x_TD: Tensor) -> Tensor:
    """x / ||x|| in float32; padding of length 0 stays 0."""
    return nnf.normalize(x_TD.float(), dim=1)


def _fill_uniform(weight: Tensor, bound: float, generator: Generator) -> None:
    weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)
