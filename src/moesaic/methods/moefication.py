"""MoEfication: per-layer routers trained to predict which blocks of the frozen dense FFN carry the activation.

Source: arXiv:2110.01786 (Findings of ACL 2022) sec. 3; variants in conf/method/moefication.yaml.
Shapes: L layers, T tokens, D model dim, B blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.methods.base import AdaptJob, Phase
from moesaic.methods.calibration import Calibration
from moesaic.methods.lm import router_parameters, train_only
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.select import TopK
from moesaic.sparse.targets import Target, captured_mass, expert_targets, normalise_targets, quantile_scale
from moesaic.training.fit import FitConfig, fit, optimizer_of
from moesaic.training.loader import RowBatches

__all__ = ["JudgedRouters", "RouterRegression", "TrainRouters", "held_out_rows", "router_batches", "router_loss"]

Loss = Literal["bce_soft", "bce_multi_hot", "mse"]
Normalise = Literal["batch_max", "quantile"]
Split = Literal["random", "tail", "window"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRouters(Phase):
    """Train every layer's router from the cached inputs of the dense model; no other weight changes.

    `target`: what a block is worth (see `sparse.targets`). `normalise`: targets over the largest in the mini-batch (as
    published) or over the layer's 99.9 % quantile, clipped to 1. `loss`: `bce_soft` on those, `bce_multi_hot` on the
    `active_frac` best blocks, `mse` between |output| and the unnormalised target (D2DMoE's form).
    `keep`: which of the routers seen on held-out rows is kept by captured mass (`second_best`: what the released
    scripts ship).
    """

    fit: FitConfig
    target: Target
    normalise: Normalise
    loss: Loss
    split: Split
    keep: Literal["best", "second_best"]
    active_frac: float = 0.2  # share of blocks in `captured_mass` and in multi-hot labels, 0..1
    held_out_frac: float = 0.1
    validate_every_steps: int = 50

    trains_weights: ClassVar[bool] = False
    uses_selection: ClassVar[bool] = False

    def run(self, job: AdaptJob) -> dict[str, Any]:
        if not any(True for _ in router_parameters(job.model)):
            return {"tokens": 0, "steps": 0, "wall_seconds": 0.0, "skipped": "the score has no parameters"}
        assert job.calibration is not None
        train_only(job.model, ("router",), job.pattern)
        held_T = held_out_rows(job.calibration, self.split, self.held_out_frac, job.seed)
        inputs = [job.calibration.inputs_TD(layer) for layer in range(job.calibration.num_layers)]
        module = RouterRegression(job.model, self, [x_TD[held_T] for x_TD in inputs])
        batches = router_batches([x_TD[~held_T] for x_TD in inputs], self.fit, job.seed)
        result = fit(module, batches, self.fit, folder=job.folder, label=job.label)
        module.validate()
        mass_L = module.restore(self.keep)
        return {"tokens": 0, "steps": result.steps, "wall_seconds": result.seconds, "captured_mass_L": mass_L}


class JudgedRouters(pl.LightningModule, ABC):
    """All layers' routers at once: their losses are separate sums, so this equals training each layer alone.

    Every `validate_every_steps` they are judged on held-out rows, and the best two of each layer are kept.
    """

    def __init__(
        self, model: PreTrainedModel, config: FitConfig, held_LTD: list[Tensor], validate_every_steps: int
    ) -> None:
        super().__init__()
        self.model, self.config, self.held_LTD = model, config, held_LTD
        self.validate_every_steps = validate_every_steps
        self.layers: list[SparseFFN] = sparse_layers(model)
        self.parameters_ = list(router_parameters(model))
        self.kept: list[list[tuple[float, dict[str, Tensor]]]] = [[] for _ in self.layers]

    @abstractmethod
    def layer_loss(self, index: int, x_TD: Tensor) -> Tensor:
        """Mean loss over tokens and blocks of the router of layer `index`, a float32 scalar."""

    @abstractmethod
    def merit(self, layer: SparseFFN, x_TD: Tensor) -> float:
        """How good the present router of `layer` is on rows it was not trained on; more is better."""

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Sum over layers of their losses."""
        # Here and not after the batch: a checkpoint is taken between the two, and must not miss a router seen.
        if self.global_step and self.global_step % self.validate_every_steps == 0:
            self.validate()
        return torch.stack([self.layer_loss(index, x_TD) for index, x_TD in enumerate(batch.values())]).sum()

    def logits(self, layer: SparseFFN, x_TD: Tensor) -> Tensor:
        """(T, B) float32 router outputs of one layer."""
        assert layer.score is not None
        return layer.score(x_TD, layer.experts)

    @torch.no_grad()
    def validate(self) -> None:
        """Judge the present routers on the held-out rows and keep the best two of each layer."""
        for layer, x_TD, kept in zip(self.layers, self.held_LTD, self.kept, strict=True):
            assert layer.score is not None
            state = {key: value.detach().clone() for key, value in layer.score.state_dict().items()}
            kept.append((self.merit(layer, x_TD), state))
            kept.sort(key=lambda entry: entry[0], reverse=True)
            del kept[2:]

    def restore(self, keep: Literal["best", "second_best"]) -> list[float]:
        """Put the kept routers back into the model; their merit on held-out rows, per layer."""
        merits = []
        for layer, kept in zip(self.layers, self.kept, strict=True):
            assert layer.score is not None
            merit, state = kept[min(1, len(kept) - 1) if keep == "second_best" else 0]
            layer.score.load_state_dict(state)
            merits.append(merit)
        return merits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["kept"] = self.kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.kept = checkpoint["kept"]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimizer_of(self.parameters_, self.config)


class RouterRegression(JudgedRouters):
    """Routers that learn what the blocks are worth; judged by the mass that the best of them capture, 0..1."""

    def __init__(self, model: PreTrainedModel, phase: TrainRouters, held_LTD: list[Tensor]) -> None:
        super().__init__(model, phase.fit, held_LTD, phase.validate_every_steps)
        self.phase = phase
        self.scale_L = [self._scale(layer, x_TD) for layer, x_TD in zip(self.layers, held_LTD, strict=True)]

    def layer_loss(self, index: int, x_TD: Tensor) -> Tensor:
        layer = self.layers[index]
        return router_loss(
            self.logits(layer, x_TD),
            expert_targets(layer.experts, x_TD, self.phase.target),
            loss=self.phase.loss,
            scale=self.scale_L[index],
            active_frac=self.phase.active_frac,
        )

    def merit(self, layer: SparseFFN, x_TD: Tensor) -> float:
        chosen = TopK(k=active_count(layer.experts.num_blocks, self.phase.active_frac))
        active_TB = chosen(self.logits(layer, x_TD)).active_TB()
        return captured_mass(expert_targets(layer.experts, x_TD, self.phase.target), active_TB)

    def _scale(self, layer: SparseFFN, x_TD: Tensor) -> float | None:
        if self.phase.normalise == "batch_max":
            return None
        return quantile_scale(expert_targets(layer.experts, x_TD, self.phase.target))


def router_batches(inputs_LTD: list[Tensor], config: FitConfig, seed: int) -> RowBatches:
    """Batches of the same rows of every layer's inputs."""
    rows = {f"layer_{index}": x_TD for index, x_TD in enumerate(inputs_LTD)}
    return RowBatches(rows, batch_size=config.batch_size, seed=seed)


def active_count(num_blocks: int, active_frac: float) -> int:
    """How many of `num_blocks` blocks the share `active_frac` is, at least one."""
    return max(1, round(active_frac * num_blocks))


def router_loss(logits_TB: Tensor, target_TB: Tensor, *, loss: Loss, scale: float | None, active_frac: float) -> Tensor:
    """Mean loss over tokens and blocks, float32, of targets >= 0; `scale` None divides them by the batch's maximum."""
    if loss == "mse":
        return F.mse_loss(logits_TB.abs(), target_TB)
    if loss == "bce_multi_hot":
        k = active_count(target_TB.shape[1], active_frac)
        hot_TB = torch.zeros_like(target_TB).scatter_(1, target_TB.topk(k, dim=1).indices, 1.0)
        return F.binary_cross_entropy_with_logits(logits_TB, hot_TB)
    soft_TB = normalise_targets(target_TB, target_TB.max().item() if scale is None else scale)
    return F.binary_cross_entropy_with_logits(logits_TB, soft_TB)


def held_out_rows(calibration: Calibration, split: Split, frac: float, seed: int) -> Tensor:
    """Boolean (T,): the rows kept for choosing a router: random rows, the last ones, or whole windows."""
    window_T = calibration.window_T()
    generator = torch.Generator().manual_seed(seed)
    if split == "tail":
        return torch.arange(len(window_T)) >= len(window_T) - int(frac * len(window_T))
    if split == "random":
        return torch.rand(len(window_T), generator=generator) < frac
    num_windows = int(window_T[-1]) + 1
    held = torch.randperm(num_windows, generator=generator)[: max(1, round(frac * num_windows))]
    return torch.isin(window_T, held)
