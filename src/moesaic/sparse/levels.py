"""Levels: nested experts, of which each token runs one. Level e is blocks 0..n_e - 1, the last level the whole FFN.

Source: arXiv:2502.12325 (linear widths F (e + 1) / E), arXiv:2310.07707 sec. 3.1 (geometric widths), arXiv:2407.19985
eq. 1 (weight 1 + alpha P). Differs: blocks are equal, so a width is a number of blocks.
Shapes: T tokens, D model dim, B blocks, E levels, U hidden width of a router, N assignments, K solved shares.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor, nn

from moesaic.sparse.combine import Combine, CombineModule
from moesaic.sparse.experts import Experts
from moesaic.sparse.precision import full_precision
from moesaic.sparse.routing import Routing
from moesaic.sparse.score import RandomScore, Score, ScoreModule
from moesaic.sparse.select import RoutingContext, Selection

__all__ = [
    "FirstAbove",
    "LevelCombine",
    "LevelCombineModule",
    "LevelMLP",
    "LevelRule",
    "Levels",
    "Nested",
    "RandomLevels",
    "SolvedKnobs",
    "between",
    "first_above",
    "level_blocks",
    "level_members",
    "level_routing",
    "level_shares",
    "level_table",
    "solve_rising",
    "solve_theta",
]

Levels = Literal["linear", "geometric"] | tuple[int, ...]

_FULL_BIAS = 4.0  # the head start of the last level where a router starts dense


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelRule(Selection):
    """A rule that gives each token one level, from E scores; the token's blocks have weight 1.

    `levels`: linear (1, 2, .., B blocks), geometric (1, 2, 4, .., B) or the block counts themselves, rising to B.
    """

    levels: Levels = "linear"

    @abstractmethod
    def level_T(self, score_TE: Tensor, context: RoutingContext) -> Tensor:
        """int64 (T,): the level of each token, 0..E-1."""

    def __call__(self, score_TX: Tensor, context: RoutingContext | None = None) -> Routing:
        if context is None:  # without one, levels that are listed still say how many blocks there are
            context = RoutingContext(num_blocks=_blocks_of(self.levels, score_TX.shape[1]))
        members_EB = level_members(level_blocks(self.levels, context.num_blocks), device=score_TX.device)
        return level_routing(self.level_T(score_TX, context), members_EB)

    def num_scores(self, num_blocks: int) -> int:
        return len(level_blocks(self.levels, num_blocks))

    def matched(self, score_TX: Tensor, share: float, num_blocks: int) -> Selection:
        """`FirstAbove` with the theta at which these scores give the mean share."""
        share_E = level_shares(level_blocks(self.levels, num_blocks), device=score_TX.device)

        def share_at(theta: float) -> float:
            return share_E[first_above(score_TX, theta)].mean().item()

        return FirstAbove(levels=self.levels, theta=solve_theta(score_TX, share_at, share))

    def check(self, num_blocks: int) -> None:
        level_blocks(self.levels, num_blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstAbove(LevelRule):
    """The first level whose score is above `theta`, the last where none is: for scores that say how good a level is."""

    theta: float

    knob: ClassVar[str] = "theta"
    adaptive: ClassVar[bool] = True

    def level_T(self, score_TE: Tensor, context: RoutingContext) -> Tensor:
        return first_above(score_TE, self.theta)


@dataclass(frozen=True, kw_only=True, slots=True)
class Nested(LevelRule):
    """The level that a router's E logits ask for, tilted so that `mean_share` of the FFNs runs on average.

    `policy` biased: argmax of z_e + knob * n_e / B, ties to the smaller level. cdf: the smallest level at which the
    cumulative probability reaches sigmoid(knob). The knob of each of `shares` is solved on data after training
    (`methods.share.SolveShares`) and interpolated between them. `mean_share` null is the router's own choice: argmax.
    Raises ValueError for shares outside 0..1 or not rising, or a share outside of what is solved.
    """

    policy: Literal["biased", "cdf"] = "biased"
    shares: tuple[float, ...] = ()
    mean_share: float | None = None

    knob: ClassVar[str] = "mean_share"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ordered = list(self.shares) == sorted(set(self.shares))
        if not ordered or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"select.shares={list(self.shares)} must rise within 0..1 (0 excluded)")
        if self.mean_share is not None and not (self.shares and self.shares[0] <= self.mean_share <= self.shares[-1]):
            solved = f"{self.shares[0]}..{self.shares[-1]}" if self.shares else "none"
            raise ValueError(
                f"select.mean_share={self.mean_share} is outside of the solved shares ({solved}). Add it to shares."
            )

    def level_T(self, score_TE: Tensor, context: RoutingContext) -> Tensor:
        if self.mean_share is None:
            return score_TE.argmax(dim=1)
        assert isinstance(context.state, SolvedKnobs)
        knob = context.state.at(self.mean_share)
        if self.policy == "cdf":
            below_TE = score_TE.softmax(dim=1).cumsum(dim=1) < torch.sigmoid(torch.tensor(knob)).item()
            return below_TE.sum(dim=1).clamp(max=score_TE.shape[1] - 1)
        share_E = level_shares(level_blocks(self.levels, context.num_blocks), device=score_TE.device)
        return (score_TE + knob * share_E).argmax(dim=1)

    def state(self, num_blocks: int) -> nn.Module | None:
        return SolvedKnobs(self.shares) if self.shares else None


class SolvedKnobs(nn.Module):
    """Buffer `knob_K`: the knob of each of the K `shares`, NaN until it is solved."""

    knob_K: Tensor

    def __init__(self, shares: Sequence[float]) -> None:
        super().__init__()
        self.shares = tuple(shares)
        self.register_buffer("knob_K", torch.full((len(shares),), torch.nan))

    def at(self, share: float) -> float:
        """The knob of `share`, linear between the two solved shares around it. ValueError before they are solved."""
        below, above, part = between(self.shares, share)
        knob = torch.lerp(self.knob_K[below], self.knob_K[above], part).item()
        if math.isnan(knob):
            raise ValueError(
                f"select.mean_share={share} has no knob yet: it is solved on calibration tokens. Add the phase "
                "moesaic.methods.share.SolveShares after training."
            )
        return knob


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelMLP(Score):
    """E logits W2 silu(W1 x + b1) + b2; `hidden` U 0 is one linear layer W2 x + b2.

    W2 starts at 0, and b2 too, or with `init` full at +4 on the last level, so that argmax starts dense. W1 starts
    uniform in +-1/sqrt(D). `detach_input` keeps the router's loss out of the backbone. ValueError for a negative U.
    """

    levels: Levels = "linear"
    hidden: int = 0
    init: Literal["zero", "full"] = "full"
    detach_input: bool = True

    def __post_init__(self) -> None:
        if self.hidden < 0:
            raise ValueError(f"score.hidden={self.hidden} must not be negative; 0 is one linear layer")

    def num_scores(self, num_blocks: int) -> int:
        return len(level_blocks(self.levels, num_blocks))

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _LevelMLPModule(self, dim, num_blocks)


class _LevelMLPModule(ScoreModule):
    config: LevelMLP

    def __init__(self, config: LevelMLP, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        num_levels = config.num_scores(num_blocks)
        self.in_UD = nn.Parameter(torch.zeros(config.hidden, dim)) if config.hidden else None
        self.in_bias_U = nn.Parameter(torch.zeros(config.hidden)) if config.hidden else None
        self.out_EU = nn.Parameter(torch.zeros(num_levels, config.hidden or dim))
        self.out_bias_E = nn.Parameter(torch.zeros(num_levels))

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        with full_precision(x_TD.device):
            h_TU = (x_TD.detach() if self.config.detach_input else x_TD).float()
            if self.in_UD is not None and self.in_bias_U is not None:
                h_TU = nnf.silu(nnf.linear(h_TU, self.in_UD.float(), self.in_bias_U.float()))
            return nnf.linear(h_TU, self.out_EU.float(), self.out_bias_E.float())

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        if self.in_UD is not None:
            bound = experts.dim**-0.5
            self.in_UD.uniform_(-bound, bound, generator=generator)
        if self.config.init == "full":
            self.out_bias_E[-1] = _FULL_BIAS


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomLevels(Score):
    """n_e / B - u with u uniform per token: `FirstAbove` draws levels that know nothing, theta 0 evenly.

    u is the fractional part of a steep projection, as in `RandomScore`: the same input has the same level everywhere.
    """

    levels: Levels = "linear"

    def num_scores(self, num_blocks: int) -> int:
        return len(level_blocks(self.levels, num_blocks))

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _RandomLevelsModule(self, dim, num_blocks)


class _RandomLevelsModule(ScoreModule):
    share_E: Tensor

    def __init__(self, config: RandomLevels, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        self.uniform = RandomScore().build(dim, 1)
        self.register_buffer("share_E", level_shares(level_blocks(config.levels, num_blocks)))

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        return self.share_E.float() - self.uniform(x_TD, experts)

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        self.uniform.initialise(experts, x_TD, generator=generator)


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelCombine(Combine):
    """Weights from level probabilities P = softmax of the E scores; all blocks of a token's prefix weigh the same.

    `by` one: 1. prob: P of the token's level. one_plus: 1 + alpha P, alpha learned from 0 and kept in [0, 1).
    soft: every block runs with the probability of a level that contains it, which is exactly the levels' mixture.
    Raises ValueError where `weight` or `scale` would weigh a second time.
    """

    levels: Levels = "linear"
    by: Literal["one", "prob", "one_plus", "soft"] = "one"

    def __post_init__(self) -> None:
        if (self.weight, self.scale, self.straight_through) != ("one", "one", "none"):
            raise ValueError("combine.by alone weighs levels: leave combine.weight, scale and straight_through out.")

    def build(self, dim: int, num_blocks: int) -> LevelCombineModule:
        return LevelCombineModule(self, dim, num_blocks)


class LevelCombineModule(CombineModule):
    """The level weights of one layer; parameter `alpha` is there only for one_plus."""

    config: LevelCombine

    def __init__(self, config: LevelCombine, dim: int, num_blocks: int) -> None:
        super().__init__(config, dim, num_blocks)
        self.levels_E = level_blocks(config.levels, num_blocks)
        self.alpha = nn.Parameter(torch.zeros(())) if config.by == "one_plus" else None

    @property
    def uses_score(self) -> bool:
        return self.config.by != "one"

    def forward(self, routing: Routing, score_TB: Tensor) -> Routing:
        """`routing` with the weights of the tokens' levels; `score_TB` holds E scores a token."""
        if self.config.by == "one":
            return routing
        prob_TE = score_TB.float().softmax(dim=1)
        if self.config.by == "soft":
            return Routing.of_all(prob_TE @ level_members(self.levels_E, device=prob_TE.device).float())
        level_T = level_table(self.levels_E, device=prob_TE.device)[routing.count_T()]
        weight_T = prob_TE.gather(1, level_T[:, None])[:, 0]
        if self.alpha is not None:
            # The bounds hold forwards only: a clamp would cut the gradient of an alpha that has left them.
            bounded = self.alpha + (self.alpha.clamp(0.0, 1.0 - 1e-6) - self.alpha).detach()
            weight_T = 1.0 + bounded.float() * weight_T
        return routing.with_weight(weight_T[routing.token_N])


def level_blocks(levels: Levels, num_blocks: int) -> tuple[int, ...]:
    """n_E: how many blocks each level has, rising, the last all of them.

    Raises ValueError for geometric levels of a number of blocks that is no power of two, and for listed levels that do
    not rise from at least 1 to `num_blocks`.
    """
    if levels == "linear":
        return tuple(range(1, num_blocks + 1))
    if levels == "geometric":
        if num_blocks & (num_blocks - 1):
            below = 1 << (num_blocks.bit_length() - 1)
            raise ValueError(
                f"levels=geometric halves the blocks down to 1, but partition.num_blocks={num_blocks} is no power of "
                f"two (nearest: {below}, {2 * below}). Use one of these, or list the levels."
            )
        return tuple(1 << e for e in range(num_blocks.bit_length()))
    if list(levels) != sorted(set(levels)) or not levels or levels[0] < 1 or levels[-1] != num_blocks:
        repaired = sorted({n for n in levels if 1 <= n < num_blocks} | {num_blocks})
        raise ValueError(
            f"levels={list(levels)} must be block counts that rise to partition.num_blocks={num_blocks}, because the "
            f"last level is the whole FFN. Nearest: {repaired}."
        )
    return tuple(levels)


def level_members(levels_E: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """Boolean (E, B): which blocks each level has, for prefixes of `levels_E` blocks."""
    return torch.arange(levels_E[-1], device=device) < torch.tensor(levels_E, device=device)[:, None]


def level_shares(levels_E: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """float32 (E,): the share of the FFN that each level runs, n_e / B."""
    return torch.tensor(levels_E, dtype=torch.float32, device=device) / levels_E[-1]


def level_table(levels_E: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """int64 (B + 1,): the largest level of at most n blocks, for n = 0..B; 0 where there is none."""
    edges_E = torch.tensor(levels_E, device=device)
    counts_X = torch.arange(levels_E[-1] + 1, device=device)
    return (torch.searchsorted(edges_E, counts_X, right=True) - 1).clamp(min=0)


def level_routing(level_T: Tensor, members_EB: Tensor) -> Routing:
    """Token t runs the blocks of `members_EB` (boolean) that its level `level_T[t]` (int64) has, with weight 1."""
    return Routing.from_mask(members_EB[level_T])


def first_above(score_TE: Tensor, theta: float) -> Tensor:
    """int64 (T,): the first level whose score exceeds `theta`; the last level where none does."""
    above_TE = score_TE > theta
    above_TE[:, -1] = True
    return above_TE.int().argmax(dim=1)


def solve_theta(score_TE: Tensor, share_at: Callable[[float], float], share: float) -> float:
    """The threshold on these scores at which `share_at` is nearest to `share`; -inf scores are above no threshold."""
    finite = score_TE[score_TE.isfinite()]
    low, high = finite.min().item() - 1, finite.max().item()
    return solve_rising(share_at, share, low, high, tolerance=0.0)[0]


def solve_rising(
    share_at: Callable[[float], float],
    share: float,
    low: float,
    high: float,
    *,
    tolerance: float,
    most_steps: int = 50,
) -> tuple[float, float]:
    """(knob, its share): the knob in low..high whose share is nearest, by bisection of a (nearly) rising function.

    Stops within `tolerance` of the wanted share. The best knob seen is kept, so a function that rises only nearly does
    no harm.
    """
    best = min(((knob, share_at(knob)) for knob in (low, high)), key=lambda seen: abs(seen[1] - share))
    for _ in range(most_steps):
        if abs(best[1] - share) <= tolerance:
            break
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        seen = (middle, share_at(middle))
        if abs(seen[1] - share) < abs(best[1] - share):
            best = seen
        low, high = (middle, high) if seen[1] < share else (low, middle)
    return best


def between(shares: Sequence[float], share: float) -> tuple[int, int, float]:
    """(below, above, part): the rising `shares` around `share`, and how far it is from the lower to the upper, 0..1."""
    above = min(bisect_right(shares, share), len(shares) - 1)
    below = max(0, above - 1)
    width = shares[above] - shares[below]
    return below, above, (share - shares[below]) / width if width else 0.0


def _blocks_of(levels: Levels, num_levels: int) -> int:
    if levels == "linear":
        return num_levels
    return 1 << (num_levels - 1) if levels == "geometric" else levels[-1]
