"""MatFormer: nested FFNs without a router; in training every step draws one width for the whole model.

Source: arXiv:2310.07707 sec. 3.1-3.3, eq. 1-2. Differs: published from scratch and unordered; here a pretrained model's
neurons are ordered by importance first. Shapes: L layers, B blocks, E levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moesaic.methods.allocate import Allocation, AllocationJob
from moesaic.methods.base import AdaptJob, Phase, select_blocks
from moesaic.methods.lm import LanguageModelling, Part, fit_language_model, train_only
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.levels import Levels, level_blocks
from moesaic.sparse.select import Prefix
from moesaic.training.fit import FitConfig

__all__ = ["MixNMatch", "NestedFinetune", "mixed_levels"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NestedFinetune(Phase):
    """Phase `finetune`: the task's loss, at each step of one level drawn uniformly for all layers and tokens."""

    fit: FitConfig
    levels: Levels
    train: tuple[Part, ...] = ("ffn",)

    uses_selection: ClassVar[bool] = False

    def run(self, job: AdaptJob) -> dict[str, Any]:
        parameters = train_only(job.model, self.train, job.pattern)
        selections = [layer.select for layer in sparse_layers(job.model)]
        job.model.train()
        module = DrawnLevels(job.model, parameters, self.fit)
        module.levels_E = level_blocks(self.levels, sparse_layers(job.model)[0].experts.num_blocks)
        facts = fit_language_model(module, job, self.fit, label=job.label)
        select_blocks(job.model, selections)
        return facts


class DrawnLevels(LanguageModelling):
    """One width per step, for the whole model."""

    levels_E: tuple[int, ...]

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        level = int(torch.randint(len(self.levels_E), ()))
        select_blocks(self.model, Prefix(k=self.levels_E[level]))
        return super().training_step(batch, index)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixNMatch(Allocation):
    """Widths between two trained levels: the lower layers run the smaller one, the last layers the larger.

    The mean share is at most the wanted one, and less than one layer's step below it. Source: arXiv:2310.07707
    sec. 3.3 (levels that do not fall with depth, of the least slope).
    """

    levels: Levels

    def counts(self, job: AllocationJob) -> list[int]:
        layers = sparse_layers(job.model)
        num_blocks = layers[0].experts.num_blocks
        levels_E = level_blocks(self.levels, num_blocks)
        return [levels_E[level] for level in mixed_levels([n / num_blocks for n in levels_E], job.share, len(layers))]


def mixed_levels(share_E: Sequence[float], share: float, num_layers: int) -> list[int]:
    """Per layer its level: e for the lower ones, e + 1 for the last floor(L (share - w_e) / (w_e+1 - w_e)).

    e is the largest level that `share` reaches. Raises ValueError for a share below the smallest level.
    """
    below = [e for e, width in enumerate(share_E) if width <= share + 1e-9]
    if not below:
        raise ValueError(f"a budget of {share:g} is below the smallest level, {share_E[0]:g} of the FFN. Raise it.")
    level = below[-1]
    if level == len(share_E) - 1:
        return [level] * num_layers
    part = (share - share_E[level]) / (share_E[level + 1] - share_E[level])
    larger = math.floor(num_layers * part + 1e-9)
    return [level] * (num_layers - larger) + [level + 1] * larger
