"""Fine-tuning of a converted model on its own objective: the phase that most recipes end with, and all controls share.

What is predicted follows from the model's head (`data.objective`): next or masked tokens, a second half, a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from moesaic.data.objective import ObjectiveBatches, forward, objective_of, task_loss
from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import find_ffns
from moesaic.methods.base import AdaptJob, Phase
from moesaic.methods.calibration import Calibration
from moesaic.sparse.layer import sparse_layers
from moesaic.training.fit import FitConfig, fit, optimizer_of, part_of

__all__ = [
    "FinetuneLM",
    "LanguageModelling",
    "adaptation_batches",
    "calibration_loss",
    "ffn_parameters",
    "forward",
    "router_parameters",
    "task_loss",
    "train_only",
]

Part = Literal["ffn", "router", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneLM(Phase):
    """Fine-tuning of chosen parts on the model's objective; everything else stays bitwise as it was.

    `train`: `ffn` (gate, up, down, their biases, and the learned scale of `combine` if there is one), `router`, `all`.
    The batches depend on the seed alone: every method and `dense_same_tokens` sees the same tokens in the same order.
    """

    fit: FitConfig
    train: tuple[Part, ...] = ("ffn",)
    span_frac: tuple[float, float] = (0.0, 1.0)  # from where to where in `fit` this phase goes, as shares of its steps

    def __post_init__(self) -> None:
        part_of(self.fit, self.span_frac)

    def run(self, job: AdaptJob) -> dict[str, Any]:
        config, first_step = part_of(self.fit, self.span_frac)
        parameters = train_only(job.model, self.train, job.pattern)
        job.model.train()
        module = LanguageModelling(job.model, parameters, config)
        return fit_language_model(module, job, config, label=job.label, first_step=first_step)


class LanguageModelling(pl.LightningModule):
    """The cross-entropy of a Hugging Face model's objective."""

    def __init__(self, model: PreTrainedModel, parameters: list[Parameter], config: FitConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.trained = parameters

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """The task's mean loss of one batch."""
        return task_loss(self.model, batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimizer_of(self.trained, self.config)


@torch.no_grad()
def calibration_loss(model: PreTrainedModel, calibration: Calibration, max_tokens: int) -> float:
    """The task's mean loss on the first calibration windows, `max_tokens` tokens or one window."""
    num_windows = max(1, max_tokens * calibration.num_windows // calibration.num_tokens)
    return task_loss(model, calibration.windows(0, num_windows)).item()


def adaptation_batches(job: AdaptJob, config: FitConfig) -> ObjectiveBatches:
    """The adaptation tokens as batches of the model's objective: a stream that depends on the seed alone."""
    objective = objective_of(job.model, job.tokens)
    return ObjectiveBatches(objective, job.tokens, context=job.context, batch_size=config.batch_size, seed=job.seed)


def fit_language_model(
    module: pl.LightningModule, job: AdaptJob, config: FitConfig, *, label: str, first_step: int = 0
) -> dict[str, Any]:
    """Fit `module` on the adaptation batches; the facts that go into the record.

    The batches of the steps before `first_step` are left out: an earlier phase of the recipe had them.
    """
    batches = adaptation_batches(job, config).after(first_step * config.accumulate)
    result = fit(module, batches, config, folder=job.folder, label=label)
    module.eval().float()
    return {
        "tokens": result.tokens,
        "steps": result.steps,
        "wall_seconds": result.seconds,
        "final_loss": result.final_loss,
    }


def ffn_parameters(model: PreTrainedModel, pattern: FFNPattern | None) -> Iterator[Parameter]:
    """The FFN weights of a dense or sparse model: what adaptation trains, and `dense_same_tokens` with it."""
    layers = sparse_layers(model)
    if layers:
        for layer in layers:
            yield from layer.experts.parameters()
            yield from layer.combine.parameters()
    else:
        for site in find_ffns(model, pattern):
            yield from site.parameters()


def router_parameters(model: PreTrainedModel) -> Iterator[Parameter]:
    """The parameters of every sparse layer's score."""
    for layer in sparse_layers(model):
        if layer.score is not None:
            yield from layer.score.parameters()


def train_only(model: PreTrainedModel, parts: tuple[Part, ...], pattern: FFNPattern | None) -> list[Parameter]:
    """Freeze `model` but for `parts`, and return what is left to train. Raises ValueError when that is nothing."""
    chosen: list[Parameter] = []
    if "all" in parts:
        chosen.extend(model.parameters())
    if "ffn" in parts:
        chosen.extend(ffn_parameters(model, pattern))
    if "router" in parts:
        chosen.extend(router_parameters(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    unique = list({id(parameter): parameter for parameter in chosen}.values())
    for parameter in unique:
        parameter.requires_grad_(True)
    if not unique:
        raise ValueError(
            f"train={list(parts)} leaves nothing to train in {type(model).__name__}; allowed: ffn, router, all"
        )
    return unique
