"""Flextron: one model whose FFN widths follow a budget that is requested at inference, per layer or per token.

Static routers see the budget alone, token routers the budget beside the token (`sparse.elastic`).
Source: arXiv:2406.10260 (ICML 2024), of which only abstract and captions could be read: phases, losses and all numbers
are a reconstruction. The single phase is that of its descendant, NVIDIA/Megatron-LM `megatron/elastification/`
@0894912..@115f5b5 (arXiv:2511.16664). See conf/method/flextron.yaml.
Shapes: L layers, E levels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.data.objective import forward
from moesaic.methods.base import AdaptJob, Phase
from moesaic.methods.elastic import (
    RoutedObjective,
    RoutedPhase,
    elastic_rule,
    set_selections,
    step_generator,
)
from moesaic.methods.lm import Part, fit_language_model, router_parameters, task_loss, train_only
from moesaic.sparse.elastic import Mix
from moesaic.sparse.layer import kept_selections, sparse_layers
from moesaic.sparse.level_cost import expected_cost
from moesaic.sparse.levels import level_blocks
from moesaic.sparse.select import AllBlocks, Prefix, Selection
from moesaic.training.fit import FitConfig, optimizer_of, part_of

__all__ = ["ElasticWidths", "JointTraining", "SurrogateRouting", "distillation_loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticWidths(Phase):
    """P1: elastic training without a router: the mean task loss of the full model and of `num_random` random widths.

    Each random width draws every layer's level evenly. All of them see the same batch, so a step costs
    `num_random` + 1 passes over it.
    """

    fit: FitConfig
    num_random: int = 2
    train: tuple[Part, ...] = ("all",)
    span_frac: tuple[float, float] = (0.0, 1.0)  # from where to where in `fit` this phase goes, as shares of its steps

    def __post_init__(self) -> None:
        part_of(self.fit, self.span_frac)
        if self.num_random < 1:
            raise ValueError(f"num_random={self.num_random} must be at least 1")

    def run(self, job: AdaptJob) -> dict[str, Any]:
        config, first_step = part_of(self.fit, self.span_frac)
        parameters = train_only(job.model, self.train, job.pattern)
        job.model.train()
        with kept_selections(job.model):
            module = RandomWidths(job, self, parameters, config)
            facts = fit_language_model(module, job, config, label=job.label, first_step=first_step)
        return {**facts, "passes_per_token": self.num_random + 1}


class RandomWidths(pl.LightningModule):
    """The task losses of the full and of random widths, on the same batch."""

    def __init__(self, job: AdaptJob, phase: ElasticWidths, parameters: list[nn.Parameter], config: FitConfig) -> None:
        super().__init__()
        self.model: PreTrainedModel = job.model
        self.phase, self.trained, self.config, self.seed = phase, parameters, config, job.seed
        self.layers = sparse_layers(job.model)
        self.rule = elastic_rule(job.model)

    def training_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        """The mean of the losses; beside it the full model's."""
        generator = step_generator(self.seed, self.global_step)
        set_selections(self.layers, [AllBlocks()] * len(self.layers))
        losses = [task_loss(self.model, batch)]
        for _number in range(self.phase.num_random):
            set_selections(self.layers, self.random_widths(generator))
            losses.append(task_loss(self.model, batch))
        return {"loss": torch.stack(losses).mean(), "full_loss": losses[0].detach()}

    def random_widths(self, generator: Generator) -> list[Selection]:
        """A level for each layer, all equally likely."""
        widths: list[Selection] = []
        for layer in self.layers:
            levels_E = level_blocks(self.rule.levels, layer.experts.num_blocks)
            widths.append(Prefix(k=levels_E[int(torch.randint(len(levels_E), (), generator=generator))]))
        return widths

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimizer_of(self.trained, self.config)


@dataclass(frozen=True, kw_only=True, slots=True)
class SurrogateRouting(RoutedPhase):
    """P2: routers alone, through a surrogate: a small MLP that learns the task loss from the levels' probabilities.

    The model is frozen, and its loss gives no gradient. While the surrogate's running squared error is below
    `surrogate_gate` (nats squared) the routers minimise the cost's gap + `surrogate_weight` * the predicted loss.
    """

    surrogate_gate: float = 0.05
    surrogate_weight: float = 1.0
    surrogate_hidden: int = 64

    def run(self, job: AdaptJob) -> dict[str, Any]:
        config, first_step = part_of(self.fit, self.span_frac)
        job.model.requires_grad_(False)
        with kept_selections(job.model):
            module = SurrogateObjective(job, self, config)
            facts = fit_language_model(module, job, config, label=job.label, first_step=first_step)
        widths = module.write_routers()
        tokens = facts.pop("tokens")
        return {**facts, "tokens": 0, "router_tokens": tokens, "surrogate_error": module.error.item(), **widths}


class SurrogateObjective(RoutedObjective):
    """P2's two losses, the surrogate's and the routers'; buffer `error` is the running squared error."""

    error: Tensor
    offset: Tensor

    def __init__(self, job: AdaptJob, phase: SurrogateRouting, config: FitConfig) -> None:
        super().__init__(job, phase, config)
        self.phase = phase
        self.surrogate = nn.Sequential(
            nn.Linear(self.cost_LE.numel(), phase.surrogate_hidden), nn.SiLU(), nn.Linear(phase.surrogate_hidden, 1)
        )
        generator = step_generator(job.seed, 0, -1)
        with torch.no_grad():
            for parameter in self.surrogate.parameters():
                bound = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.0
                parameter.uniform_(-bound, bound, generator=generator)
        self.register_buffer("error", torch.tensor(torch.inf))
        self.register_buffer("offset", torch.tensor(torch.nan))

    def training_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        budget = self.drawn_budget()
        task, prob_LE = self.mixed(batch, budget, "soft", partial(task_loss, self.model))
        task = task.detach()
        # The first loss is what the surrogate's output is counted from: it need not learn the loss of the text.
        self.offset.copy_(torch.where(self.offset.isnan(), task, self.offset))
        error = (self.predicted(prob_LE.detach(), frozen=False) - task).square()
        running = torch.where(self.error.isinf(), error.detach(), 0.9 * self.error + 0.1 * error.detach())
        self.error.copy_(running)
        loss, gap = error, self.cost.loss(expected_cost(prob_LE, self.cost_LE), budget, prob_LE)
        if self.error < self.phase.surrogate_gate:
            loss = loss + gap + self.phase.surrogate_weight * self.predicted(prob_LE, frozen=True)
        return {"loss": loss, "task_loss": task, "gap": gap.detach(), "surrogate_error": self.error.clone()}

    def predicted(self, prob_LE: Tensor, *, frozen: bool) -> Tensor:
        """The surrogate's loss in nats, 0-dim; `frozen` keeps the gradient from its own weights."""
        weights = {name: p.detach() if frozen else p for name, p in self.surrogate.named_parameters()}
        return self.offset + functional_call(self.surrogate, weights, (prob_LE.flatten(),))[0]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        surrogate = {"params": list(self.surrogate.parameters()), "lr": self.router_lr, "weight_decay": 0.0}
        return optimizer_of([surrogate, self.router_group()], self.config)


@dataclass(frozen=True, kw_only=True, slots=True)
class JointTraining(RoutedPhase):
    """Model and routers together: the task loss under drawn levels + the cost's gap at a budget drawn for the step.

    `mix`: how blocks are weighted; with two entries the second holds from `mix_switch` (share of the steps) on, so that
    the end trains what evaluation runs. The full model, without a router, takes a step instead: every `full_every`-th
    one, or each with probability `full_prob`. `distill` frozen_parent replaces the task loss by the forward KL from the
    model as it came.
    """

    mix: tuple[Mix, ...] = ("soft", "straight_through")
    mix_switch: float = 0.7
    full_every: int | None = None
    full_prob: float = 0.0
    train: tuple[Part, ...] = ("ffn",)
    distill: Literal["none", "frozen_parent"] = "none"

    def __post_init__(self) -> None:
        RoutedPhase.__post_init__(self)
        if len(self.mix) not in (1, 2):
            raise ValueError(f"mix={list(self.mix)} must be one way of mixing, or two to switch between")
        if not (0 <= self.mix_switch <= 1 and 0 <= self.full_prob <= 1):
            raise ValueError(f"mix_switch={self.mix_switch} and full_prob={self.full_prob} must be within 0..1")
        if self.full_every is not None and (self.full_every < 2 or self.full_prob):
            raise ValueError(
                f"full_every={self.full_every} must be at least 2 and excludes full_prob={self.full_prob}. Set one."
            )

    def run(self, job: AdaptJob) -> dict[str, Any]:
        config, first_step = part_of(self.fit, self.span_frac)
        parent = copy.deepcopy(job.model).requires_grad_(False) if self.distill == "frozen_parent" else None
        parameters = train_only(job.model, self.train, job.pattern)
        job.model.train()
        with kept_selections(job.model):
            module = JointObjective(job, self, parameters, config, parent)
            facts = fit_language_model(module, job, config, label=job.label, first_step=first_step)
        return {**facts, **module.write_routers()}


class JointObjective(RoutedObjective):
    """The task's loss (or the parent's KL) under drawn levels, plus the gap to the drawn budget."""

    def __init__(
        self,
        job: AdaptJob,
        phase: JointTraining,
        parameters: list[nn.Parameter],
        config: FitConfig,
        parent: PreTrainedModel | None,
    ) -> None:
        super().__init__(job, phase, config)
        self.phase = phase
        own = {id(parameter) for parameter in router_parameters(job.model)}
        self.backbone = [parameter for parameter in parameters if id(parameter) not in own]
        # A partial, no submodule: the parent is neither moved nor saved with this module.
        self.loss_of = (
            partial(task_loss, job.model) if parent is None else partial(distillation_loss, job.model, parent)
        )

    def training_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        if self.is_full_step():
            set_selections(self.layers, [AllBlocks()] * len(self.layers))
            task = self.loss_of(batch)
            return {"loss": task, "task_loss": task.detach(), "gap": torch.zeros_like(task), "budget": torch.ones(())}
        budget = self.drawn_budget()
        task, prob_LE = self.mixed(batch, budget, self.mix(), self.loss_of)
        gap = self.cost.loss(expected_cost(prob_LE, self.cost_LE), budget, prob_LE)
        return {"loss": task + gap, "task_loss": task.detach(), "gap": gap.detach(), "budget": torch.tensor(budget)}

    def is_full_step(self) -> bool:
        """Whether this step trains the full model, by the step alone."""
        if self.phase.full_every is not None:
            return (self.global_step + 1) % self.phase.full_every == 0
        return self.drawn(-2) < self.phase.full_prob

    def mix(self) -> Mix:
        """How this step weighs its blocks."""
        if self.drawn(-3) < self.sampling.hard_prob:
            return "hard_prob"
        return self.phase.mix[-1 if self.global_step >= self.phase.mix_switch * self.config.steps else 0]

    def drawn(self, stream: int) -> float:
        """A number 0..1 that depends on seed, step and `stream`."""
        return torch.rand((), generator=step_generator(self.seed, self.global_step, stream)).item()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimizer_of([*self.backbone, self.router_group()], self.config)


def distillation_loss(model: PreTrainedModel, parent: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Mean over tokens of KL(parent || model), a float32 scalar in nats; the parent runs all its blocks."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    nn.Module.to(parent, model.device)
    with torch.no_grad():
        wanted = forward(parent, inputs).logits.float().log_softmax(dim=-1)
    own = forward(model, inputs).logits.float().log_softmax(dim=-1)
    return F.kl_div(own.flatten(0, -2), wanted.flatten(0, -2), reduction="batchmean", log_target=True)
