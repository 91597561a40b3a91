"""The width oracle: which layers of a model with nested FFNs would have to be wide for each token, and what that gains.

Every pattern of per-layer widths runs whole sequences, and each token takes the pattern with its least loss among those
of equal cost. Its context then comes from that pattern, too, and not from the patterns of the tokens before it: no
router could run this, so the oracle is an optimistic bound, and the more patterns a cost has, the more so.
Source: arXiv:2410.10846 sec. 3.1 (Duo-LLM). Differs: any number of nested widths; a beam where patterns are too many.
Shapes: L layers, E levels, N windows, C tokens of a window, T = N * (C - 1) predicted tokens, P patterns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.evaluate.progress import Progress
from moesaic.sparse.layer import kept_selections, sparse_layers
from moesaic.sparse.select import Prefix
from moesaic.sparse.trace import record_routing

__all__ = ["BestPatterns", "LearnedPoint", "WidthOracle", "search_widths"]

Pattern = tuple[int, ...]  # the level of each layer, 0..E-1
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BUCKETS = 10  # of tokens by loss, and of positions


@dataclass(kw_only=True, slots=True)
class BestPatterns:
    """Of the patterns of one cost: each token's least loss so far, and the pattern that gave it."""

    loss_T: Tensor
    level_TL: Tensor
    patterns: list[Pattern] = field(default_factory=list)
    nats_P: list[float] = field(default_factory=list)

    def add(self, pattern: Pattern, loss_T: Tensor) -> None:
        """Take over what `pattern` does better; the earlier pattern wins a tie."""
        better_T = loss_T < self.loss_T
        self.loss_T = torch.where(better_T, loss_T, self.loss_T)
        self.level_TL[better_T] = torch.tensor(pattern, dtype=torch.int8)
        self.patterns.append(pattern)
        self.nats_P.append(loss_T.mean().item())


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedPoint:
    """The model's own routing at one budget: the loss of each token, and the mean share of the FFNs that it ran."""

    budget: float
    loss_T: Tensor
    share_T: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class WidthOracle:
    """What a search found. `best` is by cost, the blocks of all layers together; `exhaustive` is False for a beam."""

    levels_E: tuple[int, ...]
    num_layers: int
    exhaustive: bool
    ids_NC: Tensor
    full_T: Tensor
    narrow_T: Tensor
    best: dict[int, BestPatterns]
    learned: tuple[LearnedPoint, ...]

    @property
    def gap_T(self) -> Tensor:
        """How much each token loses with every layer at its narrowest, in nats."""
        return self.narrow_T - self.full_T

    def share(self, cost: int) -> float:
        """The mean active share of the FFNs that a cost in blocks is."""
        return cost / (self.num_layers * self.levels_E[-1])

    def rows(self) -> dict[str, Any]:
        """A column per figure, a row per token: position, token, losses, and the oracle's loss and levels per cost."""
        windows, context = self.ids_NC.shape
        columns: dict[str, Any] = {
            "window": np.arange(windows).repeat(context - 1),
            "position": np.tile(np.arange(1, context), windows),
            "token": self.ids_NC[:, 1:].flatten().numpy(),
            "full_nats": self.full_T.numpy(),
            "narrow_nats": self.narrow_T.numpy(),
        }
        for cost, found in sorted(self.best.items()):
            columns[f"oracle_nats_{cost}"] = found.loss_T.numpy()
            columns[f"oracle_levels_{cost}"] = list(found.level_TL.numpy())
        for point in self.learned:
            columns[f"learned_nats_{point.budget:g}"] = point.loss_T.numpy()
            columns[f"learned_share_{point.budget:g}"] = point.share_T.numpy()
        return columns

    def summary(self) -> dict[str, Any]:
        """Everything but the tokens, as plain JSON. Shares are of the full FFNs, losses are means in nats."""
        return {
            "protocol": {
                "windows": self.ids_NC.shape[0],
                "context": self.ids_NC.shape[1],
                "tokens": len(self.full_T),
                "num_layers": self.num_layers,
                "levels_E": list(self.levels_E),
                "patterns": sum(len(found.patterns) for found in self.best.values()),
                "search": "exhaustive" if self.exhaustive else "beam",
                "caveat": "optimistic: a token's context comes from its own pattern, and many patterns fit noise",
            },
            "full_nats": self.full_T.mean().item(),
            "narrow_nats": self.narrow_T.mean().item(),
            "difficulty": self._difficulty(),
            "budgets": [self._budget(cost, found) for cost, found in sorted(self.best.items())],
            "learned": [self._place(point) for point in self.learned],
        }

    def _difficulty(self) -> dict[str, Any]:
        any_T = torch.stack([found.loss_T for found in self.best.values()]).amin(dim=0)
        buckets = self.full_T.argsort(stable=True).tensor_split(_BUCKETS)
        positions = self.gap_T.view(self.ids_NC.shape[0], -1).mean(dim=0).tensor_split(_BUCKETS)
        return {
            "gap_nats": self.gap_T.mean().item(),
            "gap_nats_quantiles": {str(q): float(np.quantile(self.gap_T.numpy(), q)) for q in _QUANTILES},
            "narrow_better_frac": (self.gap_T < 0).float().mean().item(),
            "gap_loss_rank_correlation": _rank_correlation(self.gap_T, self.full_T),
            # High loss is not difficulty: what counts is how much width can change.
            "by_full_loss": [
                {
                    "full_nats": self.full_T[bucket].mean().item(),
                    "gap_nats": self.gap_T[bucket].mean().item(),
                    "below_full_nats": (self.full_T - any_T)[bucket].mean().item(),
                }
                for bucket in buckets
                if len(bucket)
            ],
            "gap_nats_by_position": [part.mean().item() for part in positions if len(part)],
        }

    def _budget(self, cost: int, found: BestPatterns) -> dict[str, Any]:
        nats_P = np.asarray(found.nats_P)
        low, middle, high = np.quantile(nats_P, (0.1, 0.5, 0.9)).tolist()
        static = int(nats_P.argmin())
        use_LE = nnf.one_hot(found.level_TL.long(), len(self.levels_E)).float().mean(dim=0)
        return {
            "share": self.share(cost),
            "patterns": len(nats_P),
            "oracle_nats": found.loss_T.mean().item(),
            "random_nats": float(nats_P.mean()),
            "pattern_nats": {"p10": low, "median": middle, "p90": high},
            "best_pattern": {
                "nats": float(nats_P[static]),
                "blocks_L": [self.levels_E[level] for level in found.patterns[static]],
            },
            "use_LE": use_LE.tolist(),
        }

    def _place(self, point: LearnedPoint) -> dict[str, Any]:
        """Where the learned routing lies: 0 like a random pattern of its cost, 1 like the oracle."""
        share, nats = point.share_T.mean().item(), point.loss_T.mean().item()
        costs = sorted(self.best)
        shares = [self.share(cost) for cost in costs]
        oracle, random, static = (
            float(np.interp(share, shares, values))
            for values in (
                [self.best[cost].loss_T.mean().item() for cost in costs],
                [float(np.mean(self.best[cost].nats_P)) for cost in costs],
                [min(self.best[cost].nats_P) for cost in costs],
            )
        )
        nearest = min(costs, key=lambda cost: abs(self.share(cost) - share))
        beaten = float(np.mean(np.asarray(self.best[nearest].nats_P) > nats))
        return {
            "budget": point.budget,
            "share": share,
            "nats": nats,
            "oracle_nats": oracle,
            "random_nats": random,
            "best_pattern_nats": static,
            "place_frac": (random - nats) / (random - oracle) if random > oracle else None,
            "beaten_patterns_frac": beaten,
            "share_gap_rank_correlation": _rank_correlation(point.share_T, self.gap_T),
        }


@torch.inference_mode()
def search_widths(
    model: PreTrainedModel,
    ids_NC: Tensor,
    levels_E: Sequence[int],
    *,
    budgets: Sequence[float] = (),
    limit: int = 4096,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> WidthOracle:
    """Run the causal `model` on `ids_NC` under every pattern of per-layer widths, `levels_E` block counts, rising.

    With more than `limit` patterns a beam widens one layer by one level at a time, from all-narrow to all-full, and
    keeps as many patterns of least mean loss as the limit allows. `budgets` are values of the model's own knob at which
    its routing is placed among the patterns. The model's selections and its mode are restored.
    Raises ValueError for a model without sparse layers, levels that do not rise to all blocks, or a limit below 2.
    """
    layers = sparse_layers(model)
    if not layers or any(layer.experts.num_blocks != levels_E[-1] for layer in layers):
        found = sorted({layer.experts.num_blocks for layer in layers})
        raise ValueError(f"levels {list(levels_E)} must end with all blocks of each FFN, but the model's have {found}.")
    if list(levels_E) != sorted(set(levels_E)) or len(levels_E) < 2 or levels_E[0] < 1 or limit < 2:
        raise ValueError(
            f"levels {list(levels_E)} must be two or more rising block counts, and limit={limit} at least 2."
        )
    was_training = model.training
    model.eval()
    best: dict[int, BestPatterns] = {}
    exhaustive = len(levels_E) ** len(layers) <= limit
    try:
        with kept_selections(model):
            learned = tuple(_learned(model, ids_NC, budget, batch_size) for budget in budgets)

            def losses_of(pattern: Pattern) -> Tensor:
                for layer, level in zip(layers, pattern, strict=True):
                    layer.select = Prefix(k=levels_E[level])
                return token_losses(model, ids_NC, batch_size)

            tried = every_pattern if exhaustive else beam
            for done, (pattern, loss_T) in enumerate(tried(losses_of, len(layers), len(levels_E), limit)):
                cost = sum(levels_E[level] for level in pattern)
                if cost not in best:
                    level_TL = torch.zeros(len(loss_T), len(layers), dtype=torch.int8)
                    best[cost] = BestPatterns(loss_T=torch.full_like(loss_T, torch.inf), level_TL=level_TL)
                best[cost].add(pattern, loss_T)
                if progress is not None:
                    progress(done + 1, len(levels_E) ** len(layers) if exhaustive else limit)
    finally:
        model.train(was_training)
    return WidthOracle(
        levels_E=tuple(levels_E),
        num_layers=len(layers),
        exhaustive=exhaustive,
        ids_NC=ids_NC,
        full_T=best[levels_E[-1] * len(layers)].loss_T,
        narrow_T=best[levels_E[0] * len(layers)].loss_T,
        best=best,
        learned=learned,
    )


def token_losses(model: PreTrainedModel, ids_NC: Tensor, batch_size: int) -> Tensor:
    """float32 (T,) on the CPU: the loss in nats of every token but the first of each window."""
    parts = []
    for batch_NC in ids_NC.split(batch_size):
        batch_NC = batch_NC.to(model.device)
        logits = model(input_ids=batch_NC, use_cache=False).logits[:, :-1].float()
        parts.append(nnf.cross_entropy(logits.flatten(0, 1), batch_NC[:, 1:].flatten(), reduction="none").cpu())
    return torch.cat(parts)


def _learned(model: PreTrainedModel, ids_NC: Tensor, budget: float, batch_size: int) -> LearnedPoint:
    layers = sparse_layers(model)
    for layer in layers:
        layer.select = layer.select.with_budget(budget)
    losses, shares = [], []
    for batch_NC in ids_NC.split(batch_size):
        with record_routing(model) as trace:
            losses.append(token_losses(model, batch_NC, batch_size))
        share_LT = [
            records[0].routing.count_T() / layer.experts.num_blocks
            for layer, records in zip(layers, trace.layers, strict=True)
        ]
        # The last token of a window predicts nothing that is scored.
        shares.append(torch.stack(share_LT).mean(dim=0).view(batch_NC.shape)[:, :-1].flatten().cpu())
    return LearnedPoint(budget=budget, loss_T=torch.cat(losses), share_T=torch.cat(shares))


def every_pattern(
    losses_of: Callable[[Pattern], Tensor], num_layers: int, num_levels: int, limit: int
) -> Iterator[tuple[Pattern, Tensor]]:
    """All patterns with their losses; there must be at most `limit`."""
    for pattern in itertools.product(range(num_levels), repeat=num_layers):
        yield pattern, losses_of(pattern)


def beam(
    losses_of: Callable[[Pattern], Tensor], num_layers: int, num_levels: int, limit: int
) -> Iterator[tuple[Pattern, Tensor]]:
    """Patterns with their losses, from all-narrow to all-full by single widenings; about `limit` of them at most.

    The patterns of least mean loss are widened further. They number so many that trying all their widenings keeps to
    the limit; at least one is kept.
    """
    narrow = (0,) * num_layers
    yield narrow, losses_of(narrow)
    # Each of the L * (E - 1) widenings tries at most L wider patterns of every pattern kept.
    width = max(1, limit // (num_layers**2 * (num_levels - 1)))
    kept = [narrow]
    while kept != [(num_levels - 1,) * num_layers]:
        nats: dict[Pattern, float] = {}
        for pattern in dict.fromkeys(wider for one in kept for wider in _wider(one, num_levels)):
            loss_T = losses_of(pattern)
            nats[pattern] = loss_T.mean().item()
            yield pattern, loss_T
        kept = sorted(nats, key=lambda pattern: nats[pattern])[:width]


def _wider(pattern: Pattern, num_levels: int) -> Iterator[Pattern]:
    """`pattern` with one layer one level wider, for each layer that can be."""
    for layer, level in enumerate(pattern):
        if level + 1 < num_levels:
            yield (*pattern[:layer], level + 1, *pattern[layer + 1 :])


def _rank_correlation(one_T: Tensor, other_T: Tensor) -> float | None:
    """Spearman's, -1..1; None where one of the two is constant."""
    if one_T.unique().numel() < 2 or other_T.unique().numel() < 2:
        return None
    return float(spearmanr(one_T.numpy(), other_T.numpy()).statistic)
