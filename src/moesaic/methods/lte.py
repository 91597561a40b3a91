"""LTE: routers learn together with the model what a block is worth and what it costs, then its blocks switch.

Only the soft phase is here. The hard one is `lm.FinetuneLM` under `sparse.select.Threshold`: weights are one, so that
no gradient reaches the routers.
Source: arXiv:2402.06126 (NeurIPS 2024) sec. 4; see conf/method/lte.yaml.
Shapes: N sequences, C tokens of a sequence, T = N * C, B blocks, L layers, X bins of scores.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from transformers import PreTrainedModel

from moesaic.methods.base import AdaptJob, Phase, routed_by
from moesaic.methods.lm import adaptation_batches, fit_language_model, router_parameters, task_loss, train_only
from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import RoutingRecord, sparse_layers
from moesaic.sparse.select import AllBlocks, Threshold
from moesaic.sparse.trace import observe_routing
from moesaic.training.fit import FitConfig, optimizer_of, part_of
from moesaic.training.loader import Batches

__all__ = ["SoftTraining", "efficiency_loss", "measure", "separability_loss", "soft_routing"]

_NEAR = 0.1  # a score this close to the threshold is undecided (the paper's Fig. 3)
_BINS = 10
_MEASURED_BATCHES = 4
_COURSE_ROWS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftTraining(Phase):
    """Stage 1: model and routers on L_task + eta * L_eff + separability_weight * L_sep (eq. 6), every block weighted
    with its score.

    L_eff is the mean squared score, L_sep the mean of 1 / ((score - tau)^2 + epsilon), tau that of `method.select`.
    `train`: the parts trained beside the routers. Gradients are clipped to `fit.clip_norm` for routers and the rest
    apart: L_sep has spikes that would else erase the gradient of the rest. `router_lr` null is the rate of the rest;
    `router_dtype` is what router weights are kept in while they train.
    Raises ValueError for negative weights and for a span without a step. Warns where eta could not lower any score.
    """

    fit: FitConfig
    eta: float
    separability_weight: float
    epsilon: float
    router_lr: float | None
    router_weight_decay: float
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    train: tuple[Literal["ffn", "all"], ...] = ("ffn",)
    span_frac: tuple[float, float] = (0.0, 1.0)  # from where to where in `fit` this phase goes, as shares of its steps

    def __post_init__(self) -> None:
        part_of(self.fit, self.span_frac)
        for name in ("eta", "separability_weight", "epsilon", "router_weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.router_lr is not None and self.router_lr <= 0:
            raise ValueError(f"router_lr={self.router_lr} must be positive; null takes fit.lr={self.fit.lr}")
        if not self.epsilon and self.eta < 8 * self.separability_weight:
            # d/dG of the two at G = 1, where the barrier's slope is least: 2 eta - 16 separability_weight.
            warnings.warn(
                f"epsilon=0 with eta={self.eta} < 8 * separability_weight={self.separability_weight}: the losses never "
                "lower a score that starts above 0.5, so eta hardly changes the sparsity. Set epsilon=0.01 and start "
                "the routers at zero.",
                stacklevel=2,
            )

    def run(self, job: AdaptJob) -> dict[str, Any]:
        config, first_step = part_of(self.fit, self.span_frac)
        module = SoftObjective(job, self, config)
        job.model.train()
        with soft_routing(job.model):
            facts = fit_language_model(module, job, config, label=job.label, first_step=first_step)
        following = adaptation_batches(job, config).after((first_step + config.steps) * config.accumulate)
        measured = measure(job.model, following.with_steps(_MEASURED_BATCHES), module.tau)
        return {**facts, "eta": self.eta, **measured, "course": read_course(job.folder / "metrics.jsonl")}


class SoftObjective(pl.LightningModule):
    """The task's loss, the price on scores and the push away from the threshold, seen from outside the model.

    Raises ValueError for a model whose selection has no threshold, whose score has nothing to train, or whose routers
    would start with an infinite loss.
    """

    def __init__(self, job: AdaptJob, phase: SoftTraining, config: FitConfig) -> None:
        super().__init__()
        self.model: PreTrainedModel = job.model
        self.phase, self.config = phase, config
        self.tau = threshold_of(job.model)
        for layer in sparse_layers(job.model):
            assert layer.score is not None
            layer.score.to(getattr(torch, phase.router_dtype))
        trained = train_only(job.model, (*phase.train, "router"), job.pattern)
        self.routers: list[Parameter] = list(router_parameters(job.model))
        ids = {id(parameter) for parameter in self.routers}
        self.rest: list[Parameter] = [parameter for parameter in trained if id(parameter) not in ids]
        if not self.routers:
            raise ValueError("the soft phase trains routers, but method.score has no parameters. Use score=linear.")
        if phase.separability_weight and not phase.epsilon and not any(p.any() for p in self.routers):
            raise ValueError(
                "epsilon=0 with routers that start at zero: every score is 0.5, where the separability loss is "
                "infinite. Set epsilon above 0, or score.init=uniform."
            )

    def training_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        """The whole loss; beside it, for the log, its parts, and how many scores are above or near the threshold."""
        with observed_scores(self.model) as scores:
            task = task_loss(self.model, batch)
        scores_L = [counted(scores[layer], batch) for layer in sorted(scores)]
        efficiency = torch.stack([efficiency_loss(score_TB) for score_TB in scores_L]).mean()
        loss = task + self.phase.eta * efficiency
        if self.phase.separability_weight:
            barriers_L = [separability_loss(score_TB, self.tau, self.phase.epsilon) for score_TB in scores_L]
            loss = loss + self.phase.separability_weight * torch.stack(barriers_L).mean()
        return {"loss": loss, "task_loss": task.detach(), "efficiency": efficiency.detach(), **self.shares(scores_L)}

    @torch.no_grad()
    def shares(self, scores_L: list[Tensor]) -> dict[str, Tensor]:
        """Of all scores: the share that would run a block, and the share that is near the threshold."""
        above_L = [(score_TB > self.tau).float().mean() for score_TB in scores_L]
        near_L = [((score_TB - self.tau).abs() < _NEAR).float().mean() for score_TB in scores_L]
        return {"active_frac": torch.stack(above_L).mean(), "near_frac": torch.stack(near_L).mean()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        lr = self.config.lr if self.phase.router_lr is None else self.phase.router_lr
        routers = {"params": self.routers, "lr": lr, "weight_decay": self.phase.router_weight_decay}
        return optimizer_of([*self.rest, routers], self.config)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """One norm for the routers, one for the rest."""
        if gradient_clip_val is not None:
            for parameters in (self.rest, self.routers):
                clip_grad_norm_(parameters, gradient_clip_val)


def efficiency_loss(score_TB: Tensor) -> Tensor:
    """Mean squared score (eq. 4), a float32 scalar; the prose of the paper says the mean score."""
    return score_TB.square().mean()


def separability_loss(score_TB: Tensor, tau: float, epsilon: float) -> Tensor:
    """Mean of 1 / ((score - tau)^2 + epsilon), a float32 scalar. Source: eq. 5. Differs: epsilon is ours."""
    return ((score_TB - tau).square() + epsilon).reciprocal().mean()


@contextmanager
def soft_routing(model: PreTrainedModel) -> Iterator[None]:
    """Within the scope every block runs for every token, weighted with its score."""
    with routed_by(model, AllBlocks(), Combine(weight="score")):
        yield


@contextmanager
def observed_scores(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Within the scope, the float32 scores (T, B) of each layer's latest forward, by layer, gradients attached."""
    scores: dict[int, Tensor] = {}

    def keep(layer: int, record: RoutingRecord) -> None:
        assert record.score_TB is not None
        scores[layer] = record.score_TB

    with observe_routing(model, keep):
        yield scores


def counted(score_TB: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The scores of the tokens that are not padding."""
    mask_NC = batch.get("attention_mask")
    return score_TB if mask_NC is None else score_TB[mask_NC.flatten().bool()]


def threshold_of(model: PreTrainedModel) -> float:
    """tau of a model whose layers all select by one threshold. Raises ValueError for any other selection."""
    chosen = {layer.select for layer in sparse_layers(model)}
    if len(chosen) != 1 or not isinstance(select := chosen.pop(), Threshold):
        raise ValueError(
            "LTE's soft phase pushes scores away from one threshold: method.select must be "
            "moesaic.sparse.select.Threshold"
        )
    return select.tau


@torch.no_grad()
def measure(model: PreTrainedModel, batches: Batches, tau: float) -> dict[str, Any]:
    """Mean task loss with soft and with hard routing on `batches`, and what the scores are under the latter.

    `inactive_frac_L` is the share of (token, block) pairs that do not run, `score_hist_frac_LX` the share of scores in
    each tenth of 0..1; padding does not count.
    """
    layers = sparse_layers(model)
    losses: dict[str, list[Tensor]] = {"soft": [], "hard": []}
    active_L, hist_LX = torch.zeros(len(layers)), torch.zeros(len(layers), _BINS)
    for batch in batches:
        batch = {name: column.to(model.device) for name, column in batch.items()}
        with soft_routing(model):
            losses["soft"].append(task_loss(model, batch))
        with observed_scores(model) as scores:
            losses["hard"].append(task_loss(model, batch))
        for layer, score_TB in scores.items():
            score_TB = counted(score_TB, batch).cpu()
            active_L[layer] += (score_TB > tau).sum()
            hist_LX[layer] += torch.histc(score_TB, bins=_BINS, min=0, max=1)
    pairs_L = hist_LX.sum(dim=1)
    return {
        **{f"{name}_task_loss": torch.stack(each).mean().item() for name, each in losses.items()},
        "inactive_frac_L": (1 - active_L / pairs_L).tolist(),
        "score_hist_frac_LX": (hist_LX / pairs_L[:, None]).tolist(),
    }


def read_course(history: Path) -> list[dict[str, float]]:
    """How task loss and scores moved in training: evenly spread rows of a fit's history, the last one among them."""
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    every = -(-len(rows) // _COURSE_ROWS)
    kept = ("step", "task_loss", "active_frac", "near_frac")
    return [{name: row[name] for name in kept} for row in rows[::-1][::every][::-1]]
