"""Capacity: how many tokens a block may keep of those that chose it.

A scope is what a block compares tokens within: a sequence, or a whole batch. A new rule is a frozen dataclass that
derives from `Capacity` and is named by `_target_`. No gradient flows through a capacity.
Source: arXiv:2406.00023 (Expert-Token Resonance) remark 7 and text; arXiv:2401.13920 (LocMoE) theorem 1.
Shapes: N scopes, C tokens of a scope, B blocks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "AffinityMass",
    "BoundCapacity",
    "Capacity",
    "CapacityMemory",
    "Demand",
    "FixedCapacity",
    "log_lower_bound",
]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Demand:
    """What tokens ask of blocks: float32 affinities (N, C, B), and which of the pairs were chosen, `top_l` per token.

    `dim` is D, where the layer is known.
    """

    score_NCB: Tensor
    chosen_NCB: Tensor
    top_l: int
    dim: int | None = None

    @property
    def mean_load(self) -> float:
        """Tokens that a block gets in a scope if all blocks get equally many."""
        return self.top_l * self.score_NCB.shape[1] / self.score_NCB.shape[2]


class CapacityMemory(nn.Module):
    """ln(C / mean load) per block (B,), an average over `steps` updates; 0 before the first."""

    log_factor_B: Tensor
    steps: Tensor

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.register_buffer("log_factor_B", torch.zeros(num_blocks))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, fresh_B: Tensor, ema: float) -> None:
        """Take the first value as it is, then `ema` of the old and the rest of the new one."""
        self.log_factor_B.copy_(torch.where(self.steps > 0, self.log_factor_B.lerp(fresh_B, 1 - ema), fresh_B))
        self.steps.add_(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity(ABC):
    """A rule for how many tokens each block may keep in each scope."""

    @abstractmethod
    def slots(self, demand: Demand, memory: CapacityMemory, *, training: bool) -> Tensor:
        """int64 (N, B), at least 1; training may change what `memory` holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedCapacity(Capacity):
    """`factor` times the mean load, rounded up. Source: the papers' baseline, 1.1."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive("factor", self.factor)

    def slots(self, demand: Demand, memory: CapacityMemory, *, training: bool) -> Tensor:
        num_scopes, _, num_blocks = demand.score_NCB.shape
        whole = max(1, _rounded_up(self.factor * demand.mean_load))
        return torch.full((num_scopes, num_blocks), whole, device=demand.score_NCB.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundCapacity(Capacity):
    """The papers' lower bound of the capacity for an affinity d, kept between `lowest` and `highest` mean loads.

    `delta_stat`, the d of a batch (the papers do not say which): the tokens' best affinities' maximum, mean_top1,
    quantile (of `quantile`), or per_expert, the mean over the tokens that chose the block. `bound`: exp is ETR's remark
    7, erfc LocMoE's theorem 1, never smaller. Each training batch moves ln C by 1 - `ema`: ETR recomputes it
    each step, LocMoE keeps that of the first batch (ema 1).
    Differs: the memory holds C over the mean load, so that scopes of another length have a capacity too.
    """

    delta_stat: Literal["max", "mean_top1", "quantile", "per_expert"] = "max"
    quantile: float = 0.9  # 0..1, for delta_stat quantile
    bound: Literal["exp", "erfc"] = "exp"
    lowest: float = 0.6  # of the mean load; ours: the paper saves up to 40 %
    highest: float = 1.1  # of the mean load; ours: the papers' baseline
    ema: float = 0.99

    def __post_init__(self) -> None:
        _check_positive("lowest", self.lowest)
        if self.highest < self.lowest:
            raise ValueError(f"highest={self.highest} is below lowest={self.lowest}, both times the mean load")
        for name in ("quantile", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside 0..1")

    @torch.no_grad()
    def slots(self, demand: Demand, memory: CapacityMemory, *, training: bool) -> Tensor:
        fresh_B = self.log_factor_B(demand)
        if training:
            memory.update(fresh_B, self.ema)
        kept_B = torch.where(memory.steps > 0, memory.log_factor_B, fresh_B)
        slots_B = (kept_B.exp() * demand.mean_load - 1e-4).ceil().clamp(min=1).long()
        return slots_B.expand(demand.score_NCB.shape[0], -1)

    def log_factor_B(self, demand: Demand) -> Tensor:
        """float32 (B,): ln(C / mean load) of this batch alone, clipped."""
        assert demand.dim is not None, "a bound needs the model dim"
        num_blocks = demand.score_NCB.shape[2]
        log_bound_B = log_lower_bound(self._delta_B(demand), demand.dim, num_blocks, self.bound)
        low, high = math.log(self.lowest), math.log(self.highest)
        return (log_bound_B - math.log(demand.mean_load)).clamp(low, high).float()

    def _delta_B(self, demand: Demand) -> Tensor:
        if self.delta_stat == "per_expert":
            total_B = torch.where(demand.chosen_NCB, demand.score_NCB, 0.0).sum((0, 1))
            return total_B / demand.chosen_NCB.sum((0, 1)).clamp(min=1)
        best_T = demand.score_NCB.amax(dim=2).flatten()
        if self.delta_stat == "max":
            delta = best_T.max()
        elif self.delta_stat == "mean_top1":
            delta = best_T.mean()
        else:
            # Not torch.quantile: it refuses more than 16 million values.
            delta = best_T.kthvalue(max(1, math.ceil(self.quantile * len(best_T)))).values
        return delta.expand(demand.score_NCB.shape[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class AffinityMass(Capacity):
    """As many of a block's tokens, best first, as hold `rho` (0..1) of its affinity; at most `highest` mean loads.

    Only positive affinity counts; a block without any keeps one token. Source: the text of arXiv:2406.00023, which
    names a threshold on the sum of affinities and gives no rule.
    """

    rho: float
    highest: float  # of the mean load

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho={self.rho} is outside 0..1 (0 excluded), the share of a block's affinity")
        _check_positive("highest", self.highest)

    @torch.no_grad()
    def slots(self, demand: Demand, memory: CapacityMemory, *, training: bool) -> Tensor:
        mass_NCB = torch.where(demand.chosen_NCB, demand.score_NCB, 0.0).clamp(min=0).double()
        mass_NCB = mass_NCB.sort(dim=1, descending=True).values
        wanted_NCB = mass_NCB > 0
        # At rho = 1 rounding could leave out the smallest affinities.
        if self.rho < 1:
            before_NCB = mass_NCB.cumsum(dim=1) - mass_NCB
            wanted_NCB &= before_NCB < self.rho * (1 - 1e-6) * mass_NCB.sum(dim=1, keepdim=True)
        return wanted_NCB.sum(dim=1).clamp(min=1, max=max(1, _rounded_up(self.highest * demand.mean_load)))


def log_lower_bound(delta: Tensor, dim: int, num_blocks: int, bound: Literal["exp", "erfc"] = "exp") -> Tensor:
    """float64: ln of the fewest tokens that a block of B must take when their affinity is `delta` and x has D dims.

    exp: C = exp(z^2) / B with z^2 = D d^2 / (2 - d^2), infinite from d^2 = 2 on; erfc: C = 1 / (B erfc(z)), larger.
    In logarithms, because C overflows long before d is large.
    """
    square = delta.double().square()
    z_square = torch.where(square < 2, dim * square / (2 - square).clamp(min=1e-12), torch.inf)
    if bound == "exp":
        return z_square - math.log(num_blocks)
    # ln erfc(z) = ln erfcx(z) - z^2; erfcx falls like 1 / z, so the cut changes nothing that is finite.
    cut = z_square.clamp(max=1e300)
    return cut - torch.special.erfcx(cut.sqrt()).log() - math.log(num_blocks)


def _rounded_up(tokens: float) -> int:
    # 1.1 * 10 is 11.000000000000002.
    return math.ceil(tokens - 1e-6)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value} must be positive: a capacity in mean loads")
