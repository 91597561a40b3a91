"""LLaMA-MoE: the split is left to long training of everything, with a noisy top-k router and a balance loss.

Source: arXiv:2406.16554 (EMNLP 2024) and github.com/pjlab-sys4nlp/llama-moe; see conf/method/llama_moe.yaml.
Shapes: L layers, T tokens, D model dim, B blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Generator, Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from moesaic.ffn.dense import DenseFFN
from moesaic.ffn.sites import find_ffns
from moesaic.methods.base import AdaptJob, ConvertJob, Phase, SparseMethod, layer_generator
from moesaic.methods.calibration import output_gradients
from moesaic.methods.lm import Part, fit_language_model, task_loss, train_only
from moesaic.sparse.balance import load, selected_softmax, squared_variation
from moesaic.sparse.layer import RoutingRecord, SparseFFN, sparse_layers
from moesaic.sparse.model import convert_model
from moesaic.sparse.noisy import NoisyModule
from moesaic.sparse.partition import Partition
from moesaic.sparse.select import TopK
from moesaic.sparse.stats import NeuronStats
from moesaic.sparse.trace import record_routing
from moesaic.training.fit import FitConfig, optimizer_of

__all__ = ["BalancedFinetune", "BalancedTraining", "LlamaMoE", "balance_loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaMoE(SparseMethod):
    """A sparse method whose partition may ask for the gradient of the loss at every FFN of the dense model."""

    def convert(self, job: ConvertJob) -> PreTrainedModel:
        """As every sparse method; with such a partition, after one backward pass through the calibration windows."""
        calibration = job.calibration
        if not self.partition.needs_gradients or calibration is None:
            return SparseMethod.convert(self, job)
        sites, layers = find_ffns(job.model, job.pattern), []
        gradients = output_gradients(job.model, sites, calibration)
        for site, gradient_TD in zip(sites, gradients, strict=True):
            ffn, inputs_TD = site.read(), calibration.inputs_TD(site.index)
            stats = NeuronStats(ffn, inputs_TD, calibration.window_T(), gradient_TD)
            block_F = self.partition.labels(ffn, stats, generator=layer_generator(job.seed, site.index))
            cut = replace(self, partition=_Cut(num_blocks=self.partition.num_blocks, block_F=block_F))
            layers.append(cut._layer(ffn, inputs_TD, layer_generator(job.seed, site.index)))
            site.release()
        return convert_model(job.model, layers, job.pattern)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Cut(Partition):
    """A cut that was made already."""

    block_F: Tensor

    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        return self.block_F


@dataclass(frozen=True, kw_only=True, slots=True)
class BalancedFinetune(Phase):
    """Train routers and blocks jointly on L_task + sum over layers of the balance loss, with the router's noise.

    `balance_weight` weighs CV^2(importance) + CV^2(load); `load_by_noise_alone` is the released estimator of the load.
    `activity_weight` weighs the mean score instead, for selections by a threshold, which it alone keeps sparse (L1).
    Raises ValueError, in `run`, for a balance loss with another selection than TopK.
    """

    fit: FitConfig
    balance_weight: float = 0.01
    load_by_noise_alone: bool = False
    activity_weight: float = 0.0
    train: tuple[Part, ...] = ("all",)

    def run(self, job: AdaptJob) -> dict[str, Any]:
        others = {type(layer.select).__name__ for layer in sparse_layers(job.model) if type(layer.select) is not TopK}
        if self.balance_weight and others:
            raise ValueError(
                f"balance_weight={self.balance_weight} balances a fixed number of blocks per token, but method.select "
                f"is {', '.join(sorted(others))}. Set balance_weight: 0, or use TopK."
            )
        parameters = train_only(job.model, self.train, job.pattern)
        job.model.train()
        return fit_language_model(BalancedTraining(job.model, parameters, self), job, self.fit, label=job.label)


class BalancedTraining(pl.LightningModule):
    """The task's loss on the sparse model, and what its routers did meanwhile."""

    def __init__(self, model: PreTrainedModel, parameters: list[Parameter], phase: BalancedFinetune) -> None:
        super().__init__()
        self.model, self.phase = model, phase
        self.trained = parameters

    def training_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        """The whole loss, and beside it the task's part for the log."""
        with capture_router_inputs(self.model) as inputs, record_routing(self.model) as trace:
            task = loss = task_loss(self.model, batch)
        mask_NC = batch.get("attention_mask")
        kept_T = slice(None) if mask_NC is None else mask_NC.flatten().bool()  # padding is balanced with nothing
        for layer, x_TD, records in zip(sparse_layers(self.model), inputs, trace.layers, strict=True):
            loss = loss + self.router_terms(layer, x_TD, records[-1], kept_T)
        return {"loss": loss, "task_loss": task.detach()}

    def router_terms(self, layer: SparseFFN, x_TD: Tensor, record: RoutingRecord, kept_T: slice | Tensor) -> Tensor:
        """What one layer adds to the loss, float32 (0-dim), from the tokens `kept_T`."""
        assert record.logits_TB is not None
        assert record.score_TB is not None
        total = x_TD.new_zeros((), dtype=torch.float32)
        if self.phase.balance_weight:
            active_TB = record.routing.active_TB()[kept_T]
            by_noise_alone = self.phase.load_by_noise_alone
            balance = balance_loss(layer, x_TD[kept_T], record.logits_TB[kept_T], active_TB, by_noise_alone)
            total = total + self.phase.balance_weight * balance
        if self.phase.activity_weight:
            total = total + self.phase.activity_weight * record.score_TB[kept_T].mean()
        return total

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimizer_of(self.trained, self.phase.fit)


def balance_loss(
    layer: SparseFFN, x_TD: Tensor, noisy_TB: Tensor, active_TB: Tensor, load_by_noise_alone: bool
) -> Tensor:
    """CV^2(importance) + CV^2(load) of the routed blocks of one top-k layer; without noise the first term only.

    `noisy_TB` are the logits that chose `active_TB`. Always-on blocks compete with nobody and are left out; where only
    they run there is nothing to balance, and the loss is 0.
    """
    select, score = layer.select, layer.score
    assert isinstance(select, TopK)
    assert score is not None
    routed, k = slice(select.always, None), select.k - select.always
    if not k:
        return noisy_TB.new_zeros(())
    noisy_TB = noisy_TB[:, routed]
    balance = squared_variation(selected_softmax(noisy_TB, active_TB[:, routed]).sum(dim=0))
    if not isinstance(score, NoisyModule) or score.noise_DB is None:
        return balance
    clean_TB, std_TB = score.router(x_TD, layer.experts)[:, routed], score.noise_std(x_TD)[:, routed]
    load_B = load(clean_TB, noisy_TB - clean_TB, std_TB, k, noise_alone=load_by_noise_alone)
    return balance + squared_variation(load_B)


@contextmanager
def capture_router_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within the scope, a forward appends each sparse layer's router input (T, D), gradients attached, in order."""
    inputs: list[Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    scores = [layer.score for layer in sparse_layers(model)]
    handles = [score.register_forward_pre_hook(keep) for score in scores if score is not None]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
