"""D2DMoE: the dense model is first trained towards sparse activations, then cut; routers regress output norms.

Only the first phase is here. The routers are `moefication.TrainRouters` with loss `mse` and target `output_norm`, the
number of blocks follows the token by `sparse.select.DynamicK`.
Source: arXiv:2310.04361 (NeurIPS 2024) sec. 3; released code github.com/bartwojcik/D2DMoE; see conf/method/d2dmoe.yaml.
Shapes: L layers, T tokens, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from moesaic.ffn.dense import DenseFFN
from moesaic.ffn.sites import capture_preactivations, find_ffns
from moesaic.methods.base import AdaptJob, Prepare
from moesaic.methods.calibration import flat_rows
from moesaic.methods.lm import adaptation_batches, fit_language_model, task_loss, train_only
from moesaic.methods.relufy import with_activation
from moesaic.training.fit import FitConfig, optimizer_of

__all__ = ["Sparsify", "alpha_at", "l1", "square_hoyer", "visible_units"]

Schedule = Literal["constant", "linear", "linear_warmup"]

_DISPLACEMENT = -10.0  # below it a pre-activation of GELU or SiLU counts as off


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsify(Prepare):
    """Train all weights of the dense model on L_task + alpha * mean over layers and tokens of a sparsity penalty.

    `activation` relu swaps the FFNs' activation first; keep leaves it. `penalty`: `square_hoyer` (1 for one active unit
    to F for equal ones) or `l1` (the sum over units). Both grow with F; `relative` therefore divides alpha by F, so
    that one alpha serves every width. `schedule` of alpha: constant, linear (0 to alpha over the run), linear_warmup
    (over its first half). Raises ValueError for a negative alpha.
    """

    fit: FitConfig
    activation: Literal["keep", "relu"]
    penalty: Literal["square_hoyer", "l1"]
    alpha: float
    relative: bool
    schedule: Schedule

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"prepare.alpha={self.alpha} must not be negative; 0 trains without a penalty")

    def run(self, job: AdaptJob) -> dict[str, Any]:
        if self.activation == "relu":
            job.model = with_activation(job.model, "relu")
        parameters = train_only(job.model, ("all",), job.pattern)
        job.model.train()
        module = SparseTraining(job, parameters, self)
        facts = fit_language_model(module, job, self.fit, label=job.label)
        batch = adaptation_batches(job, self.fit).batch(0)
        return {**facts, **module.measure({name: rows.to(job.model.device) for name, rows in batch.items()})}


class SparseTraining(pl.LightningModule):
    """The task's loss plus the penalty on the hidden units of every FFN, seen from outside the model."""

    def __init__(self, job: AdaptJob, parameters: list[Parameter], phase: Sparsify) -> None:
        super().__init__()
        self.model: PreTrainedModel = job.model
        self.phase = phase
        self.trained = parameters
        self.sites = find_ffns(job.model, job.pattern)
        ffns = [site.read() for site in self.sites]
        self.units: list[Callable[[Tensor], Tensor]] = [visible_units(ffn) for ffn in ffns]
        self.unit_weight_L = [1 / ffn.width if phase.relative else 1.0 for ffn in ffns]

    def training_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        """The whole loss; beside it, for the log, the task's part and the penalty before alpha."""
        loss, units_LTF = self.observed(batch)
        penalty_of = square_hoyer if self.phase.penalty == "square_hoyer" else l1
        terms_L = [w * penalty_of(u_TF).mean() for w, u_TF in zip(self.unit_weight_L, units_LTF, strict=True)]
        penalty = torch.stack(terms_L).mean()
        alpha = alpha_at(self.global_step, self.phase.fit.steps, self.phase.alpha, self.phase.schedule)
        return {"loss": loss + alpha * penalty, "task_loss": loss.detach(), "penalty": penalty.detach()}

    def observed(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The task's loss of one batch, and the units (T, F) of each layer, float32, gradients attached, no padding."""
        units: dict[int, Tensor] = {}

        def keep(index: int, pre: Tensor) -> None:
            units[index] = self.units[index](flat_rows(pre, batch.get("attention_mask")).float())

        with capture_preactivations(self.sites, keep):
            loss = task_loss(self.model, batch)
        return loss, [units[index] for index in range(len(self.sites))]

    @torch.no_grad()
    def measure(self, batch: dict[str, Tensor]) -> dict[str, list[float]]:
        """How sparse each layer has become: mean H / F, and the share of tokens without any active unit.

        The latter should stay near 0: an all-zero vector has H = 0, so the penalty rewards layers that are dead.
        """
        _, units_LTF = self.observed(batch)
        return {
            "hoyer_frac_L": [square_hoyer(u_TF).mean().item() / u_TF.shape[1] for u_TF in units_LTF],
            "all_zero_tokens_frac_L": [(u_TF == 0).all(dim=1).float().mean().item() for u_TF in units_LTF],
        }

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return optimizer_of(self.trained, self.phase.fit)


def square_hoyer(units_TF: Tensor) -> Tensor:
    """(T,): (sum |a|)^2 / (sum a^2 + 1e-15): 1 for one active unit, F for equal ones, 0 for none; free of scale."""
    return units_TF.abs().sum(dim=1).square() / (units_TF.square().sum(dim=1) + 1e-15)


def l1(units_TF: Tensor) -> Tensor:
    """(T,): sum |a| over the units."""
    return units_TF.abs().sum(dim=1)


def visible_units(ffn: DenseFFN) -> Callable[[Tensor], Tensor]:
    """What the penalty sees of `ffn`, from what its activation is given.

    ReLU: its output. GLU: act(gate), without the up branch. A plain GELU or SiLU is never exactly 0: there the distance
    of the pre-activation from -10, 0 below it.
    """
    if ffn.gated or ffn.activation.startswith("relu"):
        return ACT2FN[ffn.activation]
    return lambda pre: pre.clamp(min=_DISPLACEMENT) - _DISPLACEMENT


def alpha_at(step: int, steps: int, alpha: float, schedule: Schedule) -> float:
    """The weight of the penalty at optimizer step `step` (from 0) of `steps`."""
    if schedule == "constant":
        return alpha
    ramp = steps - 1 if schedule == "linear" else steps // 2
    return alpha * min(1.0, step / max(1, ramp))
