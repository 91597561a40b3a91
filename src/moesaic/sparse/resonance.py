"""Expert-Token Resonance: tokens choose blocks, then blocks choose among the tokens that chose them.

Source: arXiv:2406.00023 eq. 5-6. Differs: the causal modes of inference, the second choice and the arrival order are
ours. Shapes: T tokens, B blocks, N scopes, C tokens of a scope.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from moesaic.sparse.balance import max_violation, squared_variation
from moesaic.sparse.capacity import Capacity, CapacityMemory, Demand
from moesaic.sparse.routing import Routing
from moesaic.sparse.select import RoutingContext, Selection, TopK, top_blocks

__all__ = ["Floored", "ResonanceState", "TokenThenExpert", "best_of", "best_so_far"]

EvalMode = Literal["batch_topc", "no_drop", "threshold_ema", "prefix_causal"]


class ResonanceState(nn.Module):
    """What training leaves behind for inference, per block: `threshold_B`, the least urgent pair that was kept, and
    `kept_ratio_B`, kept over chosen pairs; both averages over the `seen_B` batches in which the block kept a token.

    Before any training nothing is dropped. `capacity` is what a capacity rule remembers.
    """

    threshold_B: Tensor
    kept_ratio_B: Tensor
    seen_B: Tensor

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.capacity = CapacityMemory(num_blocks)
        self.register_buffer("threshold_B", torch.full((num_blocks,), -torch.inf))
        self.register_buffer("kept_ratio_B", torch.ones(num_blocks))
        self.register_buffer("seen_B", torch.zeros(num_blocks, dtype=torch.int64))

    @torch.no_grad()
    def update(self, urgency_NCB: Tensor, chosen_NCB: Tensor, kept_NCB: Tensor, ema: float) -> None:
        """Average in one batch: a plain mean over the first 1 / (1 - ema) batches, exponential from there."""
        any_B = kept_NCB.any(dim=1).any(dim=0)
        least_NB = torch.where(kept_NCB, urgency_NCB, torch.inf).amin(dim=1)
        some_NB = kept_NCB.any(dim=1)
        least_B = torch.where(some_NB, least_NB, 0.0).sum(0) / some_NB.sum(0).clamp(min=1)
        ratio_B = kept_NCB.sum((0, 1)) / chosen_NCB.sum((0, 1)).clamp(min=1)
        weight_B = (1 / (self.seen_B + 1)).clamp(min=1 - ema)
        for average_B, new_B in ((self.threshold_B, least_B), (self.kept_ratio_B, ratio_B)):
            old_B = torch.where(self.seen_B > 0, average_B, new_B)
            average_B.copy_(torch.where(any_B, old_B.lerp(new_B, weight_B), average_B))
        self.seen_B.add_(any_B)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenThenExpert(Selection):
    """Each token takes its `top_l` best blocks, each block keeps at most its capacity of the tokens that took it.

    `capacity` null: no block refuses. `cap_scope`: a block compares the tokens of one sequence, or of the whole batch.
    `ecr_order`: a block keeps its highest affinities (the text), its lowest (bottom, the printed formula), or whoever
    came first. `overflow`: a refused token goes without (residual), or asks its next best blocks, which take it where
    they have room. A token that no block keeps gets 0.
    `eval_mode`, at inference: batch_topc is the rule of training, for which later tokens matter; no_drop refuses
    nobody; threshold_ema keeps pairs that reach the block's average threshold in training; prefix_causal keeps a
    token whose rank among the tokens so far is within the block's average kept ratio, which a KV cache cannot follow.
    `ema` is the weight of the past in those averages.
    Ties go to the lower block, and to the earlier token.
    """

    top_l: int
    capacity: Capacity | None
    cap_scope: Literal["sequence", "microbatch"] = "microbatch"
    ecr_order: Literal["top", "bottom", "arrival"] = "top"
    overflow: Literal["residual", "second_choice"] = "residual"
    eval_mode: EvalMode = "threshold_ema"
    ema: float = 0.99

    knob: ClassVar[str] = "top_l"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.top_l >= 1 and float(self.top_l).is_integer()):
            raise ValueError(f"select.top_l={self.top_l} is not a whole number of blocks from 1")
        object.__setattr__(self, "top_l", int(self.top_l))
        if not 0 <= self.ema < 1:
            raise ValueError(f"select.ema={self.ema} is outside 0..1 (1 excluded), the weight of the past")
        if self.ecr_order == "arrival" and self.eval_mode in ("threshold_ema", "prefix_causal"):
            raise ValueError(
                f"select.eval_mode={self.eval_mode} judges a token by its affinity, but select.ecr_order=arrival does "
                "not. Use eval_mode: batch_topc or no_drop."
            )

    @property
    def causal(self) -> bool:
        return self.capacity is None or self.eval_mode != "batch_topc"

    @property
    def decodes(self) -> bool:
        return self.capacity is None or self.eval_mode in ("no_drop", "threshold_ema")

    def training_form(self) -> Self:
        return replace(self, eval_mode="no_drop" if self.ecr_order == "arrival" else "threshold_ema")

    def state(self, num_blocks: int) -> ResonanceState:
        return ResonanceState(num_blocks)

    def check(self, num_blocks: int) -> None:
        TopK(k=self.top_l).check(num_blocks)

    def matched(self, score_TX: Tensor, share: float, num_blocks: int) -> Selection:
        """The same `top_l` and one capacity for all blocks that leaves the wanted number of pairs, best first."""
        chosen_TB = _ranks(score_TX) < self.top_l
        wanted = round(share * score_TX.numel())
        counts_B = chosen_TB.sum(0)
        if wanted >= counts_B.sum():
            return TopK(k=self.top_l)
        kept_by_capacity_C = counts_B.clamp(max=torch.arange(len(score_TX) + 1, device=counts_B.device)[:, None]).sum(1)
        capacity = int((kept_by_capacity_C < wanted).sum())
        best_TB = torch.where(chosen_TB, score_TX, -torch.inf).sort(dim=0, descending=True).values
        floor_B = best_TB[capacity - 1] if capacity else torch.full_like(best_TB[0], torch.inf)
        return Floored(k=self.top_l, floor_B=tuple(floor_B.tolist()))

    def __call__(self, score_TB: Tensor, context: RoutingContext | None = None) -> Routing:
        rank_TB = _ranks(score_TB)
        if not len(score_TB):
            return Routing.from_mask(rank_TB < self.top_l)
        context = context or RoutingContext(num_blocks=score_TB.shape[1])
        mode = self._mode(context)
        by_sequence = self.cap_scope == "sequence" or mode == "prefix_causal"
        scopes = (context.num_sequences if by_sequence else 1, -1)
        rank_NCB = rank_TB.unflatten(0, scopes)
        demand = Demand(
            score_NCB=score_TB.detach().unflatten(0, scopes),
            chosen_NCB=rank_NCB < self.top_l,
            top_l=self.top_l,
            dim=context.dim,
        )
        kept_NCB = self._kept(demand, rank_NCB, mode, context)
        if context.observed:
            self._note(demand, kept_NCB, context)
        return Routing.from_mask(kept_NCB.flatten(0, 1))

    def _mode(self, context: RoutingContext) -> EvalMode:
        if self.capacity is None:
            return "no_drop"
        return "batch_topc" if context.training else self.eval_mode

    def _kept(self, demand: Demand, rank_NCB: Tensor, mode: EvalMode, context: RoutingContext) -> Tensor:
        state = context.state
        if not isinstance(state, ResonanceState):  # outside a layer: nothing was learned yet
            state = self.state(context.num_blocks).to(rank_NCB.device)
        urgency_NCB = self._urgency(demand.score_NCB)
        slots_NB: Tensor | None = None
        if mode == "batch_topc":
            assert self.capacity is not None
            slots_NB = self.capacity.slots(demand, state.capacity, training=context.training)
            if context.observed:
                context.note(capacity_tokens=slots_NB.float().mean())

        def admitted(candidate_NCB: Tensor, kept_NCB: Tensor) -> Tensor:
            if slots_NB is not None:
                return best_of(urgency_NCB, candidate_NCB, slots_NB - kept_NCB.sum(1))
            if mode == "threshold_ema":
                return candidate_NCB & (urgency_NCB >= state.threshold_B)
            if mode == "prefix_causal":
                return best_so_far(urgency_NCB, candidate_NCB, state.kept_ratio_B)
            return candidate_NCB

        kept_NCB = admitted(demand.chosen_NCB, torch.zeros_like(demand.chosen_NCB))
        if context.training and self.ecr_order != "arrival":
            state.update(urgency_NCB, demand.chosen_NCB, kept_NCB, self.ema)
        if self.overflow == "second_choice":
            refused_NC1 = (demand.chosen_NCB & ~kept_NCB).sum(dim=2, keepdim=True)
            next_NCB = (rank_NCB >= self.top_l) & (rank_NCB < self.top_l + refused_NC1)
            kept_NCB = kept_NCB | admitted(next_NCB, kept_NCB)
        return kept_NCB

    def _urgency(self, score_NCB: Tensor) -> Tensor:
        """What a block keeps most of, first."""
        if self.ecr_order == "arrival":
            place_C11 = -torch.arange(score_NCB.shape[1], device=score_NCB.device, dtype=torch.float32)[:, None]
            return place_C11.expand_as(score_NCB)
        return -score_NCB if self.ecr_order == "bottom" else score_NCB

    def _note(self, demand: Demand, kept_NCB: Tensor, context: RoutingContext) -> None:
        load_B = demand.chosen_NCB.sum((0, 1)).float()
        pairs = load_B.sum()
        context.note(
            kept_frac=kept_NCB.sum() / pairs,
            drop_frac=(demand.chosen_NCB & ~kept_NCB).sum() / pairs,
            tokens_kept_nowhere_frac=(~kept_NCB.any(dim=2)).float().mean(),
            demand_cv=squared_variation(load_B).sqrt(),
            demand_max_violation=max_violation(load_B),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Floored(Selection):
    """The `k` best blocks of each token, without those whose score is below the block's floor."""

    k: int
    floor_B: tuple[float, ...]

    def __call__(self, score_TB: Tensor, context: RoutingContext | None = None) -> Routing:
        floor_B = torch.tensor(self.floor_B, device=score_TB.device)
        return Routing.from_mask((_ranks(score_TB) < self.k) & (score_TB >= floor_B))


def best_of(urgency_NCB: Tensor, candidate_NCB: Tensor, slots_NB: Tensor) -> Tensor:
    """Boolean (N, C, B): per scope and block the `slots_NB` most urgent candidates; ties to the earlier token."""
    order_NCB = torch.where(candidate_NCB, urgency_NCB, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    place_NCB = torch.arange(order_NCB.shape[1], device=order_NCB.device)[None, :, None].expand_as(order_NCB)
    rank_NCB = torch.empty_like(order_NCB).scatter(1, order_NCB, place_NCB)
    return candidate_NCB & (rank_NCB < slots_NB[:, None, :])


def best_so_far(urgency_NCB: Tensor, candidate_NCB: Tensor, ratio_B: Tensor) -> Tensor:
    """Boolean (N, C, B): candidates that are among the best `ratio_B` (rounded up) of the candidates up to them."""
    num_tokens = urgency_NCB.shape[1]
    earlier_CC = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=urgency_NCB.device).tril(-1)
    kept = []
    # Block by block, because all pairs of tokens are compared.
    for urgency_NC, candidate_NC, ratio in zip(urgency_NCB.unbind(2), candidate_NCB.unbind(2), ratio_B, strict=True):
        ahead_NCC = (urgency_NC[:, None, :] >= urgency_NC[:, :, None]) & earlier_CC & candidate_NC[:, None, :]
        allowed_NC = (ratio * candidate_NC.cumsum(dim=1) - 1e-6).ceil().clamp(min=1)
        kept.append(candidate_NC & (ahead_NCC.sum(dim=2) < allowed_NC))
    return torch.stack(kept, dim=2)


def _ranks(score_TB: Tensor) -> Tensor:
    """int64 (T, B): the place of each block in its token's order, 0 for the best; ties to the lowest block index."""
    order_TB = top_blocks(score_TB, score_TB.shape[1])
    place_TB = torch.arange(order_TB.shape[1], device=order_TB.device).expand_as(order_TB)
    return torch.empty_like(order_TB).scatter(1, order_TB, place_TB)
