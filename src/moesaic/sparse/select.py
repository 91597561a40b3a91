"""Selections: which blocks run for which token, given the scores.

A new rule is a frozen dataclass that derives from `Selection` and is named by `_target_`. Ties always go to the lowest
block index. Shapes: T tokens, B blocks, K blocks per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from moesaic.sparse.routing import Routing

__all__ = [
    "AllBlocks",
    "CumulativeProbability",
    "DynamicK",
    "Prefix",
    "Selection",
    "Threshold",
    "TopK",
    "top_blocks",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection(ABC):
    """A rule that turns scores (T, B) into a `Routing` with weight 1."""

    knob: ClassVar[str] = ""  # name of the field that sets the budget at inference; empty: there is none
    causal: ClassVar[bool] = True  # False: a token's blocks depend on other tokens of the batch

    @abstractmethod
    def __call__(self, score_TB: Tensor, *, training: bool) -> Routing:
        """The routing of float32 scores (T, B)."""

    def with_budget(self, value: float) -> Self:
        """The same rule with its knob set to `value`. Raises ValueError where there is no knob or it refuses."""
        if not self.knob:
            raise ValueError(f"{type(self).__name__} has no budget to set. Leave budgets empty, or use TopK.")
        return replace(self, **{self.knob: value})

    def check(self, num_blocks: int) -> None:
        """Raise ValueError if the rule asks for more than `num_blocks` blocks; most rules cannot."""
        return

    def static_blocks(self, num_blocks: int) -> int | None:
        """k where blocks 0..k-1 run for every token whatever the scores, so that no routing is needed; else None."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class AllBlocks(Selection):
    """Every block runs for every token."""

    def __call__(self, score_TB: Tensor, *, training: bool) -> Routing:
        return _prefix(score_TB, score_TB.shape[1])

    def static_blocks(self, num_blocks: int) -> int | None:
        return num_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix(Selection):
    """Blocks 0..k-1 run for every token, whatever the scores: a static width."""

    k: int

    knob: ClassVar[str] = "k"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _whole(self.k))

    def __call__(self, score_TB: Tensor, *, training: bool) -> Routing:
        return _prefix(score_TB, self.k)

    def check(self, num_blocks: int) -> None:
        _check_k(self.k, num_blocks)

    def static_blocks(self, num_blocks: int) -> int | None:
        return self.k


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK(Selection):
    """Blocks 0..always-1 and the best of the others run, `k` in all; 0 is allowed and runs none.

    So always-on blocks (shared experts) count as active, and k / B is the active share with and without them.
    Raises ValueError unless 0 <= always <= k.
    """

    k: int
    always: int = 0  # blocks that run for every token, whatever their scores

    knob: ClassVar[str] = "k"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _whole(self.k))
        if not 0 <= self.always <= self.k:
            raise ValueError(
                f"select.always={self.always} is outside 0..select.k={self.k}: always-on blocks count as active. "
                "Raise k or lower always."
            )

    def __call__(self, score_TB: Tensor, *, training: bool) -> Routing:
        num_tokens, num_blocks = score_TB.shape
        always_TK = torch.arange(self.always, device=score_TB.device).expand(num_tokens, -1)
        routed_TK = self.always + top_blocks(score_TB[:, self.always :], self.k - self.always)
        return Routing.from_topk(torch.cat([always_TK, routed_TK], dim=1), None, num_blocks)

    def check(self, num_blocks: int) -> None:
        _check_k(self.k, num_blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold(Selection):
    """A block runs when its score is above `tau`; equal to it is not enough. Source: arXiv:2402.06126 eq. 2."""

    tau: float

    knob: ClassVar[str] = "tau"

    def __call__(self, score_TB: Tensor, *, training: bool) -> Routing:
        return Routing.from_mask(score_TB > self.tau)


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicK(Selection):
    """A block runs when its score reaches `tau` (0..1) times the token's highest score; the highest always runs.

    Scores are meant to be >= 0: then tau 0 runs all blocks and tau 1 the best one with its ties.
    Source: arXiv:2310.04361 (dynamic-k).
    """

    tau: float

    knob: ClassVar[str] = "tau"

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ValueError(f"select.tau={self.tau} is outside 0..1, the share of the highest score")

    def __call__(self, score_TB: Tensor, *, training: bool) -> Routing:
        highest_T1 = score_TB.amax(dim=1, keepdim=True)
        return Routing.from_mask((score_TB >= self.tau * highest_T1) | (score_TB == highest_T1))


@dataclass(frozen=True, kw_only=True, slots=True)
class CumulativeProbability(Selection):
    """The fewest highest-scored blocks whose share of the token's total score reaches `p` (0..1); at least one.

    Scores must be >= 0. Blocks with score 0 run only where all are 0: then it is block 0.
    Source: arXiv:2310.04361, repository `bartwojcik/D2DMoE` (cumulative selection).
    """

    p: float

    knob: ClassVar[str] = "p"

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"select.p={self.p} is outside 0..1 (0 excluded), the share of the total score")

    def __call__(self, score_TB: Tensor, *, training: bool) -> Routing:
        ordered = score_TB.sort(dim=1, descending=True, stable=True)
        score = ordered.values.double()
        before = score.cumsum(dim=1) - score
        wanted = score > 0
        # At p = 1 rounding could leave out the smallest scores.
        if self.p < 1:
            wanted &= before < self.p * score.sum(dim=1, keepdim=True)
        wanted[:, 0] = True
        return Routing.from_mask(torch.zeros_like(wanted).scatter(1, ordered.indices, wanted))


def top_blocks(score_TB: Tensor, k: int) -> Tensor:
    """int64 (T, K): the k highest-scored blocks of each token, best first; ties to the lowest block index."""
    # torch.topk breaks ties as it likes, and differently per device.
    return score_TB.sort(dim=1, descending=True, stable=True).indices[:, :k]


def _prefix(score_TB: Tensor, k: int) -> Routing:
    num_tokens, num_blocks = score_TB.shape
    return Routing.from_prefix(k, num_tokens=num_tokens, num_blocks=num_blocks, device=score_TB.device)


def _whole(k: float) -> int:
    if k < 0 or not float(k).is_integer():
        raise ValueError(f"select.k={k} is not a whole number of blocks from 0")
    return int(k)


def _check_k(k: int, num_blocks: int) -> None:
    if k > num_blocks:
        raise ValueError(
            f"select.k={k} exceeds partition.num_blocks={num_blocks} (allowed: 0..{num_blocks}). "
            "Lower k or cut more blocks."
        )
