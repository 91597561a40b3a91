"""Selections: which blocks run for which token, given the scores.

A new rule is a frozen dataclass that derives from `Selection` and is named by `_target_`. Ties always go to the lowest
block index. Shapes: T tokens, B blocks, K blocks per token, X scores per token (B, unless the rule says otherwise).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from moesaic.sparse.routing import Routing

__all__ = [
    "AllBlocks",
    "CumulativeProbability",
    "DynamicK",
    "Prefix",
    "RoutingContext",
    "Selection",
    "Threshold",
    "TopK",
    "top_blocks",
]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingContext:
    """What a rule may know beside the scores.

    The T tokens are `num_sequences` sequences of equal length, one after the other. `state` is the module that the
    rule's own `state` built for this layer, `dim` is D where the layer is known. A rule may `note` figures of this
    forward for the trace, each a 0-dim tensor: `count_routing` averages them over tokens. `observed` is false where
    nobody will read them, so that they need not be computed.
    """

    num_blocks: int
    dim: int | None = None
    training: bool = False
    num_sequences: int = 1
    state: nn.Module | None = None
    observed: bool = True
    notes: dict[str, Tensor] = field(default_factory=dict)

    def note(self, **figures: Tensor) -> None:
        """Add figures of this forward."""
        self.notes.update({name: figure.detach() for name, figure in figures.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection(ABC):
    """A rule that turns scores (T, X) into a `Routing` with weight 1."""

    knob: ClassVar[str] = ""  # name of the field that sets the budget at inference; empty: there is none
    adaptive: ClassVar[bool] = False  # True: how many blocks run depends on the scores, not on the budget alone

    @abstractmethod
    def __call__(self, score_TX: Tensor, context: RoutingContext | None = None) -> Routing:
        """The routing of float32 scores; no context means one sequence at inference, with a block for each score."""

    @property
    def causal(self) -> bool:
        """False where a token's blocks depend on later tokens, or on other sequences of the batch."""
        return True

    @property
    def decodes(self) -> bool:
        """Whether a token that comes alone is routed as within its sequence: only then decoding is what was judged."""
        return self.causal

    def training_form(self) -> Selection:
        """The rule as training sees it: settings that matter at inference only have their defaults.

        Rules with one training form share the adapted model.
        """
        return self

    def num_scores(self, num_blocks: int) -> int:
        """X, how many scores a token needs."""
        return num_blocks

    def state(self, num_blocks: int) -> nn.Module | None:
        """What this rule keeps between forwards of one layer, saved with the model; most rules keep nothing.

        Rules of one class share it, so that it survives another budget; its tensors are buffers.
        """
        return None

    def share(self, num_blocks: int) -> float | None:
        """The active share 0..1 that the budget stands for; None where only scores tell."""
        return None

    def with_share(self, share: float, num_blocks: int) -> Selection:
        """The same rule with the budget that stands for `share`. Raises ValueError where only scores tell."""
        raise ValueError(f"the budget of {type(self).__name__} is no share of blocks. Allocate with TopK or Prefix.")

    def matched(self, score_TX: Tensor, share: float, num_blocks: int) -> Selection:
        """The rule for a layer of which `share` (0..1) of all (token, block) pairs shall run.

        `score_TX` are the layer's scores of calibration tokens. The controls of adaptive rules and the allocation of a
        budget over layers use it. Here: the threshold that the wanted number of pairs exceeds, whatever their token.
        """
        wanted = round(share * score_TX.numel())
        if wanted >= score_TX.numel():
            return Threshold(tau=-torch.inf)
        return Threshold(tau=score_TX.flatten().kthvalue(score_TX.numel() - wanted).values.item())

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

    def resolved(self, state: nn.Module | None) -> Selection:
        """The rule that this one comes down to in a layer with that `state`: itself, unless the state decides alone."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class AllBlocks(Selection):
    """Every block runs for every token."""

    def __call__(self, score_TX: Tensor, context: RoutingContext | None = None) -> Routing:
        num_blocks = _num_blocks(score_TX, context)
        return _prefix(score_TX, num_blocks, num_blocks)

    def static_blocks(self, num_blocks: int) -> int | None:
        return num_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix(Selection):
    """Blocks 0..k-1 run for every token, whatever the scores: a static width."""

    k: int

    knob: ClassVar[str] = "k"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _whole(self.k))

    def __call__(self, score_TX: Tensor, context: RoutingContext | None = None) -> Routing:
        return _prefix(score_TX, self.k, _num_blocks(score_TX, context))

    def share(self, num_blocks: int) -> float:
        return self.k / num_blocks

    def with_share(self, share: float, num_blocks: int) -> Prefix:
        return Prefix(k=round(share * num_blocks))

    def matched(self, score_TX: Tensor, share: float, num_blocks: int) -> Selection:
        return self.with_share(share, num_blocks)

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

    def __call__(self, score_TB: Tensor, context: RoutingContext | None = None) -> Routing:
        num_tokens, num_blocks = score_TB.shape
        if not self.always:
            return Routing.from_topk(top_blocks(score_TB, self.k), None, num_blocks)
        always_TK = torch.arange(self.always, device=score_TB.device).expand(num_tokens, -1)
        routed_TK = self.always + top_blocks(score_TB[:, self.always :], self.k - self.always)
        return Routing.from_topk(torch.cat([always_TK, routed_TK], dim=1), None, num_blocks)

    def share(self, num_blocks: int) -> float:
        return self.k / num_blocks

    def with_share(self, share: float, num_blocks: int) -> TopK:
        return replace(self, k=max(self.always, round(share * num_blocks)))

    def matched(self, score_TX: Tensor, share: float, num_blocks: int) -> Selection:
        return self.with_share(share, num_blocks)

    def check(self, num_blocks: int) -> None:
        _check_k(self.k, num_blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold(Selection):
    """A block runs when its score is above `tau`; equal to it is not enough. Source: arXiv:2402.06126 eq. 2."""

    tau: float

    knob: ClassVar[str] = "tau"
    adaptive: ClassVar[bool] = True

    def __call__(self, score_TB: Tensor, context: RoutingContext | None = None) -> Routing:
        return Routing.from_mask(score_TB > self.tau)


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicK(Selection):
    """A block runs when its score reaches `tau` (0..1) times the token's highest score; the highest always runs.

    Scores are meant to be >= 0: then tau 0 runs all blocks and tau 1 the best one with its ties. Where all scores are 0
    every block runs; the trace counts these tokens (`all_zero_share`).
    Source: arXiv:2310.04361 (dynamic-k).
    """

    tau: float

    knob: ClassVar[str] = "tau"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ValueError(f"select.tau={self.tau} is outside 0..1, the share of the highest score")

    def __call__(self, score_TB: Tensor, context: RoutingContext | None = None) -> Routing:
        highest_T1 = score_TB.amax(dim=1, keepdim=True)
        if context is not None:
            context.note(all_zero_share=(highest_T1 == 0).float().mean())
        return Routing.from_mask((score_TB >= self.tau * highest_T1) | (score_TB == highest_T1))


@dataclass(frozen=True, kw_only=True, slots=True)
class CumulativeProbability(Selection):
    """The fewest highest-scored blocks whose share of the token's total score reaches `p` (0..1); at least one.

    Scores must be >= 0. Blocks with score 0 run only where all are 0: then it is block 0.
    Source: arXiv:2310.04361, repository `bartwojcik/D2DMoE` (cumulative selection).
    """

    p: float

    knob: ClassVar[str] = "p"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"select.p={self.p} is outside 0..1 (0 excluded), the share of the total score")

    def __call__(self, score_TB: Tensor, context: RoutingContext | None = None) -> Routing:
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


def _num_blocks(score_TX: Tensor, context: RoutingContext | None) -> int:
    return score_TX.shape[1] if context is None else context.num_blocks


def _prefix(score_TX: Tensor, k: int, num_blocks: int) -> Routing:
    return Routing.from_prefix(k, num_tokens=score_TX.shape[0], num_blocks=num_blocks, device=score_TX.device)


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
