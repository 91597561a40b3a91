"""DynaMoE: nested experts, and a router that learns from labels how wide each token needs the FFN to be.

A reconstruction: the paper's text was not at hand, only its abstract and what others quote. Labels come from the
agreement of each nested expert with the whole FFN (`sparse.similarity`), inference is `sparse.levels.Nested`.
Source: arXiv:2502.12325; see conf/method/dynamoe.yaml for what is the paper's and what is our choice.
Shapes: L layers, T tokens, D model dim, B blocks, E levels, N sequences, C context.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.data.objective import forward
from moesaic.methods.base import AdaptJob, Phase, routed_by, select_blocks
from moesaic.methods.difficulty import (
    agreement,
    difficulty_shares,
    label_histograms,
    level_frequencies,
    next_token_losses,
)
from moesaic.methods.lm import Part, fit_language_model, router_parameters, task_loss, train_only
from moesaic.methods.share import calibration_batches
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.levels import (
    LevelCombine,
    LevelRule,
    Levels,
    Nested,
    level_blocks,
    level_members,
    level_routing,
    level_shares,
)
from moesaic.sparse.model import head_of
from moesaic.sparse.residual import capture_residuals, residual_norms
from moesaic.sparse.routing import Routing
from moesaic.sparse.score import JointScoreModule, ScoreModule
from moesaic.sparse.select import RoutingContext, Selection
from moesaic.sparse.similarity import LabelRule, Similarity, label_levels, level_similarity, theta_of_share
from moesaic.training.fit import FitConfig, optimizer_of

__all__ = ["Lesson", "LevelFinetune", "Taught", "taught"]

Dispatch = Literal["label", "router", "random", "soft"]

_THETAS = (0.5, 0.7, 0.8, 0.9, 0.95)  # of the label histograms in the record
_MEASURED_TOKENS = 4096
_ROWS_KEPT = 10  # points of the training history that the record repeats


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelFinetune(Phase):
    """Phase `finetune`: lm_weight * task loss + router_weight * cross-entropy of the routers to difficulty labels.

    `similarity`, `label_rule`, `theta`: what level a token needs (`sparse.similarity`); theta null is solved on
    calibration tokens so that the labels of the untrained model run `label_share` of the FFNs, over all layers.
    `label_source`: the experts as they are (current) or as they were converted (frozen). `dispatch`: which level a
    token runs in training: its label, the router's first choice, a random one, or all of them mixed (soft); the first
    `label_first_frac` of the steps run labels, soft ones excepted. `explore_frac` of the tokens move to a random level,
    so that every prefix goes on learning. What a router chooses is its most probable level, or what `train_select`
    makes of its logits. `router_lr` is the routers' own peak rate; they do not decay.
    Raises ValueError for shares outside 0..1, and for a label share where theta is given.
    """

    fit: FitConfig
    levels: Levels
    similarity: Similarity
    label_rule: LabelRule
    label_source: Literal["current", "frozen"]
    dispatch: Dispatch
    label_first_frac: float
    explore_frac: float
    lm_weight: float
    router_weight: float
    train: tuple[Part, ...]
    router_lr: float
    theta: float | None = None
    label_share: float | None = None
    train_select: LevelRule | None = None

    uses_selection: ClassVar[bool] = False  # the levels come from the routers; shares are solved afterwards

    def __post_init__(self) -> None:
        for name in ("label_first_frac", "explore_frac", "label_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is outside 0..1")
        if (self.theta is None) == (self.label_share is None):
            raise ValueError("theta and label_share are two ways to say one thing: give one of them, the other null")

    def run(self, job: AdaptJob) -> dict[str, Any]:
        assert job.calibration is not None
        batches = calibration_batches(job.calibration, _MEASURED_TOKENS, job.model.device)
        parameters = optimizer_groups(job.model, self, train_only(job.model, self.train, job.pattern))
        with taught(job.model, self, batches[0]) as lesson:
            base_LTE = base_similarities(job.model, lesson, batches)
            lesson.theta = self.theta_of(base_LTE, level_shares(lesson.levels_E, device=base_LTE[0].device))
            histograms = label_histograms(base_LTE, (*_THETAS, lesson.theta), self.label_rule)
            job.model.train()
            module = LevelTraining(job.model, parameters, self, lesson)
            with dispatched(job.model, self):
                facts = fit_language_model(module, job, self.fit, label=job.label)
            judged = judge(job.model, lesson, batches)
        return {
            **facts,
            "theta": lesson.theta,
            "base_labels_LE_by_theta": histograms,
            "history": history(job),
            **judged,
        }

    def theta_of(self, score_LTE: Sequence[Tensor], share_E: Tensor) -> float:
        """The given theta, or the one that the labels' share asks for."""
        if self.theta is not None:
            return self.theta
        assert self.label_share is not None
        return theta_of_share(torch.cat(list(score_LTE)), self.label_rule, share_E, self.label_share)


class LevelTraining(pl.LightningModule):
    """The task's loss through the dispatched levels, and the routers' cross-entropy to the same tokens' labels."""

    def __init__(
        self, model: PreTrainedModel, parameters: list[dict[str, Any]], phase: LevelFinetune, lesson: Lesson
    ) -> None:
        super().__init__()
        self.model, self.phase = model, phase
        self.groups = parameters
        self.lesson = lesson

    def training_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        """The whole loss; beside it, for the log, its parts, the labels' mean share and the routers' accuracy."""
        first = self.global_step < self.phase.label_first_frac * self.phase.fit.steps
        dispatch: Dispatch = "label" if first and self.phase.dispatch != "soft" else self.phase.dispatch
        with self.lesson.given(dispatch) as seen:
            loss = task_loss(self.model, batch)
        router_loss = torch.stack([F.cross_entropy(each.logits_TE, each.label_T) for each in seen]).mean()
        return {
            "loss": self.phase.lm_weight * loss + self.phase.router_weight * router_loss,
            "task_loss": loss.detach(),
            "router_loss": router_loss.detach(),
            "label_share": torch.cat([self.lesson.share_T(each.label_T) for each in seen]).mean(),
            "router_accuracy": torch.cat([each.choice_T == each.label_T for each in seen]).float().mean(),
        }

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimizer_of(self.groups, self.phase.fit)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Taught:
    """What one layer's tokens were told in one forward: similarities, labels, the router's logits, and what ran."""

    similarity_TE: Tensor
    label_T: Tensor
    logits_TE: Tensor
    level_T: Tensor

    @property
    def choice_T(self) -> Tensor:
        """int64 (T,): the level that the router wants most."""
        return self.logits_TE.argmax(dim=1)


class Lesson:
    """Labels and levels of all layers while a model is `taught`; forwards are seen only in a `given` scope."""

    def __init__(self, phase: LevelFinetune, levels_E: tuple[int, ...]) -> None:
        self.phase, self.levels_E = phase, levels_E
        self.residual_L: dict[int, Tensor] = {}
        self.theta = 0.0
        self._dispatch: Dispatch = "router"
        self._seen: list[Taught] = []

    @contextmanager
    def given(self, dispatch: Dispatch) -> Iterator[list[Taught]]:
        """Within the scope tokens run the levels of `dispatch`; the list gets what each layer was told, in order."""
        self._dispatch, self._seen = dispatch, []
        try:
            yield self._seen
        finally:
            self._seen = []
            self.residual_L.clear()

    def share_T(self, level_T: Tensor) -> Tensor:
        """float32 (T,): the share of the FFN that each token's level runs."""
        return level_shares(self.levels_E, device=level_T.device)[level_T]

    @torch.no_grad()
    def levels(self, index: int, x_TD: Tensor, teacher: Experts, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        """int64 (T,): the level that each token of layer `index` runs, its label being noted beside it."""
        similarity_TE = level_similarity(
            teacher, x_TD, self.levels_E, self.phase.similarity, residual_TD=self.residual_L.get(index)
        )
        label_T = label_levels(similarity_TE, self.theta, self.phase.label_rule)
        level_T = logits_TE.argmax(dim=1)
        if self._dispatch == "label":
            level_T = label_T
        elif self._dispatch == "random":
            level_T = self._random(label_T)
        elif self.phase.train_select is not None:
            level_T = self.phase.train_select.level_T(logits_TE, context)
        if context.training:
            moved_T = torch.rand(label_T.shape, device=label_T.device) < self.phase.explore_frac
            level_T = torch.where(moved_T, self._random(label_T), level_T)
        self._seen.append(Taught(similarity_TE=similarity_TE, label_T=label_T, logits_TE=logits_TE, level_T=level_T))
        return level_T

    def _random(self, label_T: Tensor) -> Tensor:
        return torch.randint_like(label_T, len(self.levels_E))


class TaughtScore(JointScoreModule):
    """A layer's router under a `Lesson`, which chooses the level; `own` is the router, `teacher` the frozen experts."""

    def __init__(self, own: ScoreModule, lesson: Lesson, index: int, teacher: Experts | None) -> None:
        super().__init__(own.config)
        self.own, self.teacher = own, teacher
        self.lesson, self.index = lesson, index

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        return self.own(x_TD, experts)

    def route(
        self, x_TD: Tensor, experts: Experts, select: Selection, context: RoutingContext
    ) -> tuple[Routing, Tensor]:
        logits_TE = self.own(x_TD, experts)
        level_T = self.lesson.levels(self.index, x_TD, self.teacher or experts, logits_TE, context)
        return level_routing(level_T, level_members(self.lesson.levels_E, device=level_T.device)), logits_TE


@contextmanager
def taught(model: PreTrainedModel, phase: LevelFinetune, batch: dict[str, Tensor]) -> Iterator[Lesson]:
    """Within the scope the levels of every layer come from the lesson; `batch` shows where the residual stream is."""
    layers = sparse_layers(model)
    lesson = Lesson(phase, level_blocks(phase.levels, layers[0].experts.num_blocks))
    norms = residual_norms(model, batch) if phase.similarity == "resid_cos" else []
    routers, selections = [layer.score for layer in layers], [layer.select for layer in layers]
    select_blocks(model, Nested(levels=phase.levels))
    for index, (layer, router) in enumerate(zip(layers, routers, strict=True)):
        assert router is not None
        frozen = copy.deepcopy(layer.experts).requires_grad_(False) if phase.label_source == "frozen" else None
        layer.score = TaughtScore(router, lesson, index, frozen)
    try:
        with capture_residuals(norms, lesson.residual_L):
            yield lesson
    finally:
        for layer, router in zip(layers, routers, strict=True):
            layer.score = router
        select_blocks(model, selections)


def dispatched(model: PreTrainedModel, phase: LevelFinetune) -> AbstractContextManager[None]:
    """The scope of training: a soft dispatch mixes all levels, others combine as the model does."""
    if phase.dispatch != "soft":
        return nullcontext()
    return routed_by(model, sparse_layers(model)[0].select, LevelCombine(levels=phase.levels, by="soft"))


def optimizer_groups(model: PreTrainedModel, phase: LevelFinetune, trained: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The backbone (only matrices decay) and the routers, at their own rate and without decay."""
    routers = {id(parameter) for parameter in router_parameters(model)}
    rest = [p for p in trained if id(p) not in routers]
    return [
        {"params": [p for p in rest if p.ndim > 1]},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in routers], "weight_decay": 0.0, "lr": phase.router_lr},
    ]


@torch.no_grad()
def base_similarities(model: PreTrainedModel, lesson: Lesson, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Per layer (T, E): the similarities of the whole, untrained model on calibration tokens."""
    lesson.theta = math.inf  # no prefix is good enough, so that every token runs the whole FFN
    seen = []
    for batch in batches:
        with lesson.given("label") as layers:
            forward(model, batch)
        seen.append([layer.similarity_TE for layer in layers])
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]


@torch.no_grad()
def judge(model: PreTrainedModel, lesson: Lesson, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """How the routers' first choices compare with the labels of the same stream, and which tokens are given width.

    Facts per layer; `share_by_loss_quartile_LQ` (causal language models only) is the mean active share of the quarters
    of tokens whose next token is predicted best, .., worst.
    """
    seen: list[list[Taught]] = []
    losses: list[Tensor] = []
    for batch in batches:
        with lesson.given("router") as layers:
            output = forward(model, batch)
        seen.append(layers)
        if head_of(model) == "causal_lm":
            losses.append(next_token_losses(output.logits, batch["input_ids"]))
    num_levels = len(lesson.levels_E)
    facts: dict[str, Any] = {"silent_tokens_frac_L": [], "labels_LE": [], "levels_LE": []}
    for told in zip(*seen, strict=True):
        label_T, choice_T = torch.cat([one.label_T for one in told]), torch.cat([one.choice_T for one in told])
        silent_T = torch.cat([one.similarity_TE[:, 0].isneginf() for one in told])
        facts["silent_tokens_frac_L"].append(silent_T.float().mean().item())
        facts["labels_LE"].append(level_frequencies(label_T, num_levels))
        facts["levels_LE"].append(level_frequencies(choice_T, num_levels))
        for name, value in agreement(choice_T, label_T, num_levels).items():
            facts.setdefault(f"router_{name}_L", []).append(value)
        if losses:
            share_T = lesson.share_T(choice_T)
            quartiles = difficulty_shares(share_T, torch.cat(losses))
            facts.setdefault("share_by_loss_quartile_LQ", []).append(quartiles)
    return facts


def history(job: AdaptJob) -> list[dict[str, float]]:
    """A few rows of the fit's log, evenly spread: step, mean label share, routers' accuracy, the task's loss."""
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    picked = sorted({round(i * (len(rows) - 1) / max(1, _ROWS_KEPT - 1)) for i in range(_ROWS_KEPT)})
    names = ("step", "label_share", "router_accuracy", "task_loss")
    return [{name: rows[index][name] for name in names} for index in picked]
