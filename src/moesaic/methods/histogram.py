"""The control that a level router must beat: random levels, as often as the router gives them in each layer.

Shapes: L layers, T tokens, D model dim, E levels, K shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from moesaic.data.objective import forward
from moesaic.methods.base import AdaptJob, Phase, layer_generator, select_blocks
from moesaic.methods.share import calibration_batches
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.levels import Levels, Nested, between, level_blocks, level_members, level_routing, level_table
from moesaic.sparse.routing import Routing
from moesaic.sparse.score import JointScoreModule, RandomScore, Score, ScoreModule
from moesaic.sparse.select import AllBlocks, RoutingContext, Selection
from moesaic.sparse.trace import RoutingRecord, observe_routing

__all__ = ["HistogramLevels", "HistogramRouters", "level_histograms"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HistogramRouters(Phase):
    """Phase `histogram`, after the shares are solved: every router gives way to its own level frequencies.

    They are counted at each share on `max_tokens` calibration tokens. Raises ValueError for another selection than
    `Nested` with solved shares.
    """

    max_tokens: int = 8192

    def run(self, job: AdaptJob) -> dict[str, Any]:
        select = sparse_layers(job.model)[0].select
        if not isinstance(select, Nested) or not select.shares:
            raise ValueError(f"HistogramRouters needs Nested with select.shares, but select is {select}.")
        assert job.calibration is not None
        job.model.eval()
        batches = calibration_batches(job.calibration, self.max_tokens, job.model.device)
        by_share = []
        for share in select.shares:
            select_blocks(job.model, select.with_budget(share))
            by_share.append(level_histograms(job.model, batches, select.levels))
        select_blocks(job.model, select)
        score = HistogramLevels(levels=select.levels, shares=select.shares)
        for index, layer in enumerate(sparse_layers(job.model)):
            module = score.build(layer.experts.dim, layer.experts.num_blocks)
            module.initialise(layer.experts, None, generator=layer_generator(job.seed, index))
            assert isinstance(module, _HistogramModule)
            module.frequency_KE.copy_(torch.stack([frequency_LE[index] for frequency_LE in by_share]))
            layer.score = module.to(job.model.device)
        return {"tokens": 0, "steps": 0, "wall_seconds": 0.0}


@torch.inference_mode()
def level_histograms(model: PreTrainedModel, batches: list[dict[str, Tensor]], levels: Levels) -> list[Tensor]:
    """Per layer float32 (E,): the share of tokens that run each level at the model's present budget."""
    layers = sparse_layers(model)
    levels_E = level_blocks(levels, layers[0].experts.num_blocks)
    level_X = level_table(levels_E, device=model.device)
    counts_LE = [torch.zeros(len(levels_E), device=model.device) for _ in layers]

    def count(index: int, record: RoutingRecord) -> None:
        counts_LE[index] += torch.bincount(level_X[record.routing.count_T()], minlength=len(levels_E))

    with observe_routing(model, count):
        for batch in batches:
            forward(model, batch)
    return [counts_E / counts_E.sum() for counts_E in counts_LE]


@dataclass(frozen=True, kw_only=True, slots=True)
class HistogramLevels(Score):
    """Random levels of given frequencies, one row of them for each of `shares`, mixed for shares in between.

    It chooses the level itself, whatever the selection; of that it reads the budget alone.
    """

    levels: Levels
    shares: tuple[float, ...]

    def num_scores(self, num_blocks: int) -> int:
        return len(level_blocks(self.levels, num_blocks))

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _HistogramModule(self, dim, num_blocks)


class _HistogramModule(JointScoreModule):
    config: HistogramLevels
    frequency_KE: Tensor

    def __init__(self, config: HistogramLevels, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        self.uniform = RandomScore().build(dim, 1)
        self.register_buffer("frequency_KE", torch.zeros(len(config.shares), config.num_scores(num_blocks)))

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        return self.uniform(x_TD, experts).expand(-1, self.frequency_KE.shape[1])

    def route(
        self, x_TD: Tensor, experts: Experts, select: Selection, context: RoutingContext
    ) -> tuple[Routing, Tensor]:
        logits_TE = self(x_TD, experts)
        if isinstance(select, AllBlocks):
            return select(logits_TE, context), logits_TE
        if not isinstance(select, Nested) or select.mean_share is None:
            raise ValueError(f"HistogramLevels follows the budget of Nested, but select is {select}.")
        below, above, part = between(self.config.shares, select.mean_share)
        edges_E = torch.lerp(self.frequency_KE[below], self.frequency_KE[above], part).cumsum(0)
        level_T = (logits_TE[:, :1] >= edges_E[:-1]).sum(dim=1)
        members_EB = level_members(level_blocks(self.config.levels, context.num_blocks), device=x_TD.device)
        return level_routing(level_T, members_EB), logits_TE

    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        self.uniform.initialise(experts, x_TD, generator=generator)
