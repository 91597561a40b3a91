"""Elastic widths: a requested budget decides the levels, for a whole layer or together with the token.

A budget is the mean cost that is asked for, 0..1 of the full FFNs. It reaches the routers as a code: one-hot at a
trained budget, linear between two of them, clamped outside.
Source: arXiv:2406.10260 (Flextron: routers set by a target), through its descendant's code, NVIDIA/Megatron-LM
`megatron/elastification/router/hybrid_flex_router.py` @044c9ab (code, router, Gumbel sampling). Differs: FFNs only,
levels are prefixes of equal blocks and mix on block outputs, evaluation takes the argmax without noise.
Shapes: T tokens, D model dim, B blocks, E levels, K trained budgets, U hidden width of a router, L layers, X rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor, nn

from moesaic.sparse.experts import Experts
from moesaic.sparse.levels import LevelRule, Levels, level_blocks, level_members
from moesaic.sparse.precision import full_precision
from moesaic.sparse.routing import Routing
from moesaic.sparse.score import JointScoreModule, Score
from moesaic.sparse.select import Prefix, RoutingContext, Selection

__all__ = [
    "BudgetRouter",
    "BudgetedLevelMLP",
    "ElasticRule",
    "LevelMixture",
    "Mix",
    "StaticLevels",
    "TokenLevels",
    "budget_code",
    "gumbel_noise",
    "gumbel_softmax",
    "level_logits",
    "mixture_weights",
]

Mix = Literal["soft", "hard_prob", "straight_through"]
Sampler = Callable[[Tensor], Tensor]

_LEAK = 0.1  # slope of the static router's LeakyReLU below 0
_INIT_STD = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticRule(LevelRule):
    """A rule whose levels follow from the requested `budget`; its routers are trained at `trained_budgets`.

    Raises ValueError for budgets outside 0..1 or trained ones that do not rise.
    """

    budget: float
    trained_budgets: tuple[float, ...]

    knob: ClassVar[str] = "budget"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        trained = list(self.trained_budgets)
        if not trained or trained != sorted(set(trained)) or not all(0 < budget <= 1 for budget in trained):
            raise ValueError(f"select.trained_budgets={trained} must rise within 0..1 (0 excluded)")
        if not 0 < self.budget <= 1:
            raise ValueError(f"select.budget={self.budget} is outside 0..1 (0 excluded), the requested mean cost")

    def code_K(self) -> Tensor:
        """float32 (K,): how the routers see the budget."""
        return budget_code(self.budget, self.trained_budgets)


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticLevels(ElasticRule):
    """Every token of a layer runs the level that the layer's `BudgetRouter` gives the budget: a plain slice.

    Until a phase has trained the router it is the whole FFN.
    """

    hidden: int = 128

    def level_T(self, score_TE: Tensor, context: RoutingContext) -> Tensor:
        num_levels = self.num_scores(context.num_blocks)
        level = num_levels - 1 if context.state is None else _router(context.state).level(self.budget)
        return torch.full(score_TE.shape[:1], level, dtype=torch.int64, device=score_TE.device)

    def state(self, num_blocks: int) -> nn.Module:
        return BudgetRouter(self.trained_budgets, self.hidden, self.num_scores(num_blocks), num_blocks, self.levels)

    def static_blocks(self, num_blocks: int) -> int:
        return num_blocks

    def resolved(self, state: nn.Module | None) -> Selection:
        return self if state is None else Prefix(k=_router(state).blocks(self.budget))


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLevels(ElasticRule):
    """Each token runs the level with the highest logit, ties to the smaller; with a score that is told the budget."""

    def level_T(self, score_TE: Tensor, context: RoutingContext) -> Tensor:
        return score_TE.argmax(dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelMixture(ElasticRule):
    """For training: every block runs with a weight that carries the gradient of the level probabilities.

    `sample` turns E logits per token into probabilities (T, E), or gives those of the layer, whatever the logits.
    """

    sample: Sampler
    mix: Mix

    def level_T(self, score_TE: Tensor, context: RoutingContext) -> Tensor:
        return self.sample(score_TE).argmax(dim=1)

    def __call__(self, score_TX: Tensor, context: RoutingContext | None = None) -> Routing:
        assert context is not None
        members_EB = level_members(level_blocks(self.levels, context.num_blocks), device=score_TX.device)
        return Routing.of_all(mixture_weights(self.sample(score_TX), members_EB, self.mix))


class BudgetRouter(nn.Module):
    """What budget gives one layer which level: W2 LeakyReLU(W1 u) of the budget's code u, buffers, zeros until trained.

    The layers of a model hold the same W1 (`in_UK`); W2 (`out_EU`) is their own.
    """

    in_UK: Tensor
    out_EU: Tensor

    def __init__(
        self, trained_budgets: Sequence[float], hidden: int, num_levels: int, num_blocks: int, levels: Levels
    ) -> None:
        super().__init__()
        self.trained_budgets = tuple(trained_budgets)
        self.levels_E = level_blocks(levels, num_blocks)
        self.register_buffer("in_UK", torch.zeros(hidden, len(self.trained_budgets)))
        self.register_buffer("out_EU", torch.zeros(num_levels, hidden))
        self._known: dict[float, int] = {}

    @torch.no_grad()
    def fill(self, in_UK: Tensor, out_EU: Tensor) -> None:
        """Take over a trained router."""
        self.in_UK.copy_(in_UK)
        self.out_EU.copy_(out_EU)
        self._known.clear()

    @property
    def trained(self) -> bool:
        """Whether any weight is not 0."""
        return bool(self.out_EU.any())

    def level(self, budget: float) -> int:
        """The level with the highest logit, ties to the smaller; the last one of an untrained router."""
        # Looked up once: reading a tensor in every forward would make a GPU wait.
        if budget not in self._known:
            with torch.no_grad(), full_precision(self.in_UK.device):
                code_K = budget_code(budget, self.trained_budgets).to(self.in_UK.device)
                best = int(level_logits(code_K, self.in_UK.float(), self.out_EU.float()).argmax())
            self._known[budget] = best if self.trained else len(self.levels_E) - 1
        return self._known[budget]

    def blocks(self, budget: float) -> int:
        """How many blocks that level has."""
        return self.levels_E[self.level(budget)]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known.clear()


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetedLevelMLP(Score):
    """E logits W2 silu(W1 [x ; u]) of the token and the budget's code u, no biases; the input gets no gradient.

    Starts: W1 uniform in +-1/sqrt(D), W2 normal with deviation 0.1. Works with `TokenLevels` of the same
    `trained_budgets`. Source: ours; arXiv:2406.10260 names an input-adaptive router, its shape is not known.
    """

    trained_budgets: tuple[float, ...]
    levels: Levels = "linear"
    hidden: int = 32

    def num_scores(self, num_blocks: int) -> int:
        return len(level_blocks(self.levels, num_blocks))

    def build(self, dim: int, num_blocks: int) -> _BudgetedLevelMLPModule:
        return _BudgetedLevelMLPModule(self, dim, num_blocks)


class _BudgetedLevelMLPModule(JointScoreModule):
    config: BudgetedLevelMLP

    def __init__(self, config: BudgetedLevelMLP, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        self.in_UD = nn.Parameter(torch.zeros(config.hidden, dim))
        self.in_UK = nn.Parameter(torch.zeros(config.hidden, len(config.trained_budgets)))
        self.out_EU = nn.Parameter(torch.zeros(config.num_scores(num_blocks), config.hidden))

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        """The logits at the largest trained budget."""
        return self.logits_at(x_TD, self.config.trained_budgets[-1])

    def logits_at(self, x_TD: Tensor, budget: float) -> Tensor:
        """float32 (T, E) logits at `budget`."""
        with full_precision(x_TD.device):
            code_K = budget_code(budget, self.config.trained_budgets).to(x_TD.device)
            offset_U = self.in_UK.float() @ code_K
            h_TU = nnf.silu(nnf.linear(x_TD.detach().float(), self.in_UD.float(), offset_U))
            return nnf.linear(h_TU, self.out_EU.float())

    def route(
        self, x_TD: Tensor, experts: Experts, select: Selection, context: RoutingContext
    ) -> tuple[Routing, Tensor]:
        if not isinstance(select, ElasticRule):  # a control, or a slice: whatever it runs, it asks for no budget
            logits_TE = self(x_TD, experts)
            return select(logits_TE, context), logits_TE
        if select.trained_budgets != self.config.trained_budgets:
            raise ValueError(
                f"score.trained_budgets={list(self.config.trained_budgets)} differ from select.trained_budgets="
                f"{list(select.trained_budgets)}. Give both the same."
            )
        logits_TE = self.logits_at(x_TD, select.budget)
        return select(logits_TE, context), logits_TE

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        bound = experts.dim**-0.5
        for weight in (self.in_UD, self.in_UK):
            weight.uniform_(-bound, bound, generator=generator)
        self.out_EU.normal_(0.0, _INIT_STD, generator=generator)


def budget_code(budget: float, trained_K: Sequence[float]) -> Tensor:
    """float32 (K,), entries >= 0 with sum 1: where `budget` lies among the rising `trained_K`; clamped outside."""
    code_K = torch.zeros(len(trained_K))
    budget = min(max(budget, trained_K[0]), trained_K[-1])
    below = max(0, bisect_right(trained_K, budget) - 1)
    part = 0.0
    if below + 1 < len(trained_K):
        part = (budget - trained_K[below]) / (trained_K[below + 1] - trained_K[below])
        code_K[below + 1] = part
    code_K[below] = 1.0 - part
    return code_K


def level_logits(code_K: Tensor, in_UK: Tensor, out_XU: Tensor) -> Tensor:
    """(X,): W2 LeakyReLU(W1 u) of the static router, X being the E levels of a layer, or those of all layers."""
    return out_XU @ nnf.leaky_relu(in_UK @ code_K, _LEAK)


def gumbel_noise(shape: Sequence[int], generator: Generator) -> Tensor:
    """float32 standard Gumbel noise on the CPU."""
    uniform = torch.rand(tuple(shape), generator=generator).clamp(min=1e-20)
    return -(-uniform.log()).clamp(min=1e-20).log()


def gumbel_softmax(logits_XE: Tensor, noise_XE: Tensor, tau: float) -> Tensor:
    """float32 (X, E): softmax((z + g) / tau), one-hot as tau goes to 0."""
    return ((logits_XE.float() + noise_XE) / tau).softmax(dim=1)


def mixture_weights(prob_TE: Tensor, members_EB: Tensor, mix: Mix) -> Tensor:
    """float32 (T, B): with which weight each block runs; the gradient reaches the probabilities.

    soft: the probability of a level that contains the block, so that block outputs add up to the mixture of the levels'
    outputs exactly. hard_prob: the likeliest level, times its probability. straight_through: 1 for the likeliest
    level's blocks, with the gradient of soft.
    """
    # Less the levels without the block: a block that all levels have weighs exactly 1, whatever the rounding.
    soft_TB = 1.0 - prob_TE @ (~members_EB).to(prob_TE.dtype)
    if mix == "soft":
        return soft_TB
    best_T = prob_TE.argmax(dim=1)
    hard_TB = members_EB[best_T].to(prob_TE.dtype)
    if mix == "hard_prob":
        return hard_TB * prob_TE.gather(1, best_T[:, None])
    return hard_TB + (soft_TB - soft_TB.detach())


def _router(state: nn.Module) -> BudgetRouter:
    assert isinstance(state, BudgetRouter)
    return state
