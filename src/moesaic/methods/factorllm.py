"""FactorLLM: few large experts, a linear router taught with labels that the layer's own dense FFN gives.

Source: arXiv:2408.11855, and its released code where variants say so; see conf/method/factorllm.yaml.
Shapes: T tokens, D model dim, B blocks, C context, k active blocks per token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.data.objective import forward
from moesaic.ffn.dense import DenseFFN
from moesaic.methods.base import AdaptJob, Phase, select_blocks
from moesaic.methods.calibration import Calibration
from moesaic.methods.lm import Part, fit_language_model, task_loss, train_only
from moesaic.sparse.experts import Experts
from moesaic.sparse.labels import best_subset, block_grams, fitted_scale, pa_distances, smallest_blocks
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.select import AllBlocks, TopK
from moesaic.sparse.targets import expert_targets
from moesaic.sparse.trace import record_routing
from moesaic.training.fit import FitConfig, optimizer_of

__all__ = ["JointFinetune", "LabelRouters", "balance_penalty", "fit_scales", "prior_approximate_loss", "router_loss"]

Criterion = Literal["pa", "pa_unscaled", "subset_oracle", "output_norm", "l1"]
RouterLoss = Literal["kl_student_teacher", "cross_entropy", "bce"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRouters(Phase):
    """Phase `router`: train the routers on labels from the frozen dense FFN, all layers in one pass.

    `criterion`: which k blocks a token should use: `pa` (each block alone against the dense output scaled by
    1 / (B // k)), `pa_unscaled`, `subset_oracle` (the k blocks whose sum is nearest the dense output), `output_norm`,
    `l1`. `loss`: `kl_student_teacher` (as published, target softmax of the label mask), `cross_entropy` to the
    mask / k, or `bce`. `confidence_weight` weighs the published L_bal, which penalises
    confidence and does not balance load.
    """

    fit: FitConfig
    criterion: Criterion
    loss: RouterLoss
    confidence_weight: float = 0.0

    trains_weights: ClassVar[bool] = False

    def run(self, job: AdaptJob) -> dict[str, Any]:
        parameters = train_only(job.model, ("router",), job.pattern)
        k = active_blocks(job.model)
        selections = [layer.select for layer in sparse_layers(job.model)]
        select_blocks(job.model, AllBlocks())  # the teacher pass is the dense model
        facts = fit_language_model(LabelledRouting(job.model, parameters, self, k), job, self.fit, label=job.label)
        select_blocks(job.model, selections)
        if job.calibration is not None:
            fit_scales(job.model, job.calibration)
        return {**facts, "tokens": 0, "router_tokens": facts["tokens"]}


class LabelledRouting(pl.LightningModule):
    """One dense forward gives every layer's input; labels and losses of all layers follow from their Gram matrices."""

    def __init__(
        self, model: PreTrainedModel, parameters: list[torch.nn.Parameter], phase: LabelRouters, k: int
    ) -> None:
        super().__init__()
        self.model, self.phase, self.k = model, phase, k
        self.trained = parameters

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Sum over layers of the router loss, mean over the batch's tokens."""
        with capture_layer_inputs(self.model) as inputs, torch.no_grad():
            self.model.eval()
            forward(self.model, batch)
        losses = [self.layer_loss(layer, x_TD) for layer, x_TD in zip(sparse_layers(self.model), inputs, strict=True)]
        return torch.stack(losses).sum()

    def layer_loss(self, layer: SparseFFN, x_TD: Tensor) -> Tensor:
        """Router loss of one layer on its inputs, a float32 scalar."""
        assert layer.score is not None
        with torch.no_grad():
            mask_TB = label_blocks(layer.experts, x_TD, self.k, self.phase.criterion).float()
        logits_TB = layer.score(x_TD, layer.experts)
        loss = router_loss(logits_TB, mask_TB, self.phase.loss)
        if self.phase.confidence_weight:
            loss = loss + self.phase.confidence_weight * balance_penalty(logits_TB, self.k)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimizer_of(self.trained, self.phase.fit)


@dataclass(frozen=True, kw_only=True, slots=True)
class JointFinetune(Phase):
    """The released code's joint objective: L_LM + router_weight * L_PA + confidence_weight * L_bal, teacher frozen.

    Doubles the FFN memory: once a block has moved, its dense teacher is no longer the sum of the blocks.
    """

    fit: FitConfig
    router_weight: float
    confidence_weight: float
    train: tuple[Part, ...] = ("ffn", "router")

    def run(self, job: AdaptJob) -> dict[str, Any]:
        parameters = train_only(job.model, self.train, job.pattern)
        job.model.train()
        module = JointObjective(job.model, parameters, self, active_blocks(job.model))
        return fit_language_model(module, job, self.fit, label=job.label)


class JointObjective(pl.LightningModule):
    """Language-model loss on the sparse model, router losses against a frozen copy of each dense FFN."""

    def __init__(
        self, model: PreTrainedModel, parameters: list[torch.nn.Parameter], phase: JointFinetune, k: int
    ) -> None:
        super().__init__()
        self.model, self.phase, self.k = model, phase, k
        self.trained = parameters
        self.teachers: list[DenseFFN] = [frozen_copy(layer.experts) for layer in sparse_layers(model)]

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        with capture_layer_inputs(self.model) as inputs, record_routing(self.model) as trace:
            loss = task_loss(self.model, batch)
        for layer, teacher, x_TD, records in zip(
            sparse_layers(self.model), self.teachers, inputs, trace.layers, strict=True
        ):
            with torch.no_grad():
                distance_TB = teacher_distances(layer.experts, teacher, x_TD, 1 / (layer.experts.num_blocks // self.k))
                mask_TB = smallest_blocks(distance_TB, self.k).float()
            logits_TB = records[-1].logits_TB
            assert logits_TB is not None
            loss = loss + self.phase.router_weight * router_loss(logits_TB, mask_TB, "kl_student_teacher")
            loss = loss + self.phase.confidence_weight * balance_penalty(logits_TB, self.k)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimizer_of(self.trained, self.phase.fit)


def label_blocks(experts: Experts, x_TD: Tensor, k: int, criterion: Criterion) -> Tensor:
    """Boolean (T, B): the k blocks each token should use by `criterion`, from blocks that are still dense slices."""
    if criterion == "l1":
        return smallest_blocks(-expert_targets(experts, x_TD, "l1"), k)
    gram_TBB = block_grams(experts, x_TD)
    if criterion == "subset_oracle":
        return best_subset(gram_TBB, k)
    if criterion == "output_norm":
        return smallest_blocks(-gram_TBB.diagonal(dim1=1, dim2=2), k)
    teacher_scale = 1.0 if criterion == "pa_unscaled" else 1 / (experts.num_blocks // k)
    return smallest_blocks(pa_distances(gram_TBB, teacher_scale, experts.dim), k)


def teacher_distances(experts: Experts, teacher: DenseFFN, x_TD: Tensor, teacher_scale: float) -> Tensor:
    """float32 (T, B): mean over outputs of (e_b - c Y)^2 with a teacher Y that is no longer the blocks' sum."""
    scaled_TD = teacher_scale * teacher(x_TD).float()
    blocks = (replace(experts.dense_ffn(b, b + 1), down_bias_D=None) for b in range(experts.num_blocks))
    return torch.stack([(block(x_TD).float() - scaled_TD).square().mean(dim=1) for block in blocks], dim=1)


def frozen_copy(experts: Experts) -> DenseFFN:
    """The blocks as they are now, as one dense FFN without output bias that no optimiser reaches."""
    return replace(copy.deepcopy(experts).requires_grad_(False).dense_ffn(), down_bias_D=None)


@contextmanager
def capture_layer_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within the scope, a forward pass appends each sparse layer's input, flattened to (T, D), in layer order."""
    inputs: list[Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].detach().reshape(-1, args[0].shape[-1]))

    handles = [layer.register_forward_pre_hook(keep) for layer in sparse_layers(model)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def router_loss(logits_TB: Tensor, mask_TB: Tensor, loss: RouterLoss) -> Tensor:
    """Mean over tokens of the chosen loss; `mask_TB` in {0, 1} marks each token's k labelled blocks."""
    if loss == "kl_student_teacher":
        return prior_approximate_loss(logits_TB, mask_TB)
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits_TB, mask_TB)
    target_TB = mask_TB / mask_TB.sum(dim=1, keepdim=True)
    return -(target_TB * logits_TB.log_softmax(dim=1)).sum(dim=1).mean()


def prior_approximate_loss(logits_TB: Tensor, mask_TB: Tensor) -> Tensor:
    """KL(softmax(r) || softmax(m)), student first, probabilities clipped to [1e-7, 1 - 1e-7], mean over tokens.

    Source: arXiv:2408.11855, L_PA, as in its released code. Its optimum is a margin of exactly 1, not confidence.
    """
    student_TB = logits_TB.softmax(dim=1).clamp(1e-7, 1 - 1e-7)
    teacher_TB = mask_TB.softmax(dim=1).clamp(1e-7, 1 - 1e-7)
    return (student_TB * (student_TB / teacher_TB).log()).sum(dim=1).mean()


def balance_penalty(logits_TB: Tensor, k: int) -> Tensor:
    """Mean over tokens and blocks of the probability of the k chosen blocks: the published L_bal."""
    return logits_TB.softmax(dim=1).topk(k, dim=1).values.sum(dim=1).mean() / logits_TB.shape[1]


def active_blocks(model: PreTrainedModel) -> int:
    """k of a model whose layers all select top-k. Raises ValueError for any other selection."""
    chosen = {layer.select for layer in sparse_layers(model)}
    if len(chosen) != 1 or not isinstance(select := chosen.pop(), TopK):
        raise ValueError(
            "FactorLLM's labels need one k for all layers: method.select must be moesaic.sparse.select.TopK"
        )
    return select.k


@torch.no_grad()
def fit_scales(model: PreTrainedModel, calibration: Calibration, *, max_tokens: int = 4096) -> None:
    """Set the scales that are found on data: `fitted` to s*(layer, k) for every k, `learned` to its start.

    s* = sum <Y, Y_S> / sum ||Y_S||^2 over calibration tokens, with Y the dense output and Y_S the sum of the blocks
    that the present router chooses. Valid while blocks are slices of the dense FFN; layers with another rule are left
    alone.
    """
    for index, layer in enumerate(sparse_layers(model)):
        scale_X, learned = layer.combine.scale_X, layer.combine.scale
        if scale_X is None and learned is None:
            continue
        x_TD = calibration.inputs_TD(index)[:max_tokens]
        gram_TBB = block_grams(layer.experts, x_TD)
        if learned is not None:
            learned.fill_(fitted_scale(gram_TBB, layer.route(x_TD)[0].active_TB()))
        if scale_X is not None:
            kept = layer.select
            for k in range(1, layer.experts.num_blocks + 1):
                layer.select = TopK(k=k)
                scale_X[k] = fitted_scale(gram_TBB, layer.route(x_TD)[0].active_TB())
            layer.select = kept
