"""Expert-Token Resonance: a router without parameters, so balance and locality act by reshaping the FFNs' inputs.

The routing is in `sparse`: `grap` scores, `resonance` selects, `capacity` limits, `softmax_combine` weighs, `aligned`
cuts. Here is the one phase that trains. LocMoE (arXiv:2401.13920) and the neighbours are variants.
Source: arXiv:2406.00023; see conf/method/expert_token_resonance.yaml.
Shapes: L layers, N sequences, C tokens of a sequence, T tokens, D model dim, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from moesaic.data.objective import forward
from moesaic.methods.base import AdaptJob, Phase
from moesaic.methods.calibration import Calibration
from moesaic.methods.factorllm import capture_layer_inputs
from moesaic.methods.lm import Part, fit_language_model, task_loss, train_only
from moesaic.sparse.balance import locality_divergence, top_share_penalty
from moesaic.sparse.layer import RoutingRecord, sparse_layers
from moesaic.sparse.resonance import ResonanceState
from moesaic.sparse.separation import ch_index, token_correlation
from moesaic.sparse.softmax_combine import SoftmaxCombineModule
from moesaic.sparse.trace import record_routing
from moesaic.training.fit import FitConfig, optimizer_of

__all__ = ["ResonantTraining", "TrainResonance", "learned_state", "separation"]

_SEPARATION_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResonance(Phase):
    """Train on L_task + mean over layers of alpha * top-share penalty + mu * locality divergence.

    Both are of softmax(`aux_temp` * score); sqrt_dim is sqrt(D), which brings cosines to the scale of logits. The
    divergence deals sequences and blocks to `nodes` nodes and leaves `leak` (0..1) of the mass to foreign blocks.
    `train`: FFNs with gamma, learned scores where there are any, or all weights.
    Differs: the mean over layers, mu, nodes and leak are ours. Raises ValueError for more nodes than sequences.
    """

    fit: FitConfig
    alpha: float
    mu: float
    aux_temp: float | Literal["sqrt_dim"]
    nodes: int = 1
    leak: float = 0.01
    train: tuple[Part, ...] = ("ffn", "router")

    def __post_init__(self) -> None:
        for name in ("alpha", "mu"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 switches the loss off")
        if not 0 < self.leak < 1:
            raise ValueError(f"leak={self.leak} is outside 0..1 (both excluded): a hard zero has no finite divergence")
        if not 1 <= self.nodes <= self.fit.batch_size:
            raise ValueError(
                f"nodes={self.nodes} is outside 1..fit.batch_size={self.fit.batch_size}: each node gets a sequence"
            )

    def run(self, job: AdaptJob) -> dict[str, Any]:
        before = separation(job.model, job.calibration)
        parameters = train_only(job.model, self.train, job.pattern)
        job.model.train()
        facts = fit_language_model(ResonantTraining(job.model, parameters, self), job, self.fit, label=job.label)
        after = separation(job.model, job.calibration)
        moved = {f"{name}_before": values for name, values in before.items()}
        return {**facts, **after, **moved, **learned_state(job.model)}


class ResonantTraining(pl.LightningModule):
    """The task's loss on the sparse model, and the two auxiliary losses of its scores."""

    def __init__(self, model: PreTrainedModel, parameters: list[Parameter], phase: TrainResonance) -> None:
        super().__init__()
        self.model, self.phase = model, phase
        self.trained = parameters

    def training_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        """The whole loss; beside it, for the log, its parts and what the selections noted, means over layers."""
        with record_routing(self.model) as trace:
            task = task_loss(self.model, batch)
        last = [records[-1] for records in trace.layers]
        num_sequences = len(batch["input_ids"])
        terms = [
            self.auxiliary(record, layer.experts.dim, num_sequences)
            for layer, record in zip(sparse_layers(self.model), last, strict=True)
        ]
        balance, locality = (torch.stack(values).mean() for values in zip(*terms, strict=True))
        loss = task + self.phase.alpha * balance + self.phase.mu * locality
        parts = {"task_loss": task, "balance_loss": balance, "locality_loss": locality, **mean_notes(last)}
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def auxiliary(self, record: RoutingRecord, dim: int, num_sequences: int) -> tuple[Tensor, Tensor]:
        """Penalty and divergence of one layer before alpha and mu, float32 (0-dim); 0 for a loss that is off."""
        assert record.score_TB is not None
        temperature = dim**0.5 if self.phase.aux_temp == "sqrt_dim" else self.phase.aux_temp
        prob_TB = (temperature * record.score_TB).softmax(dim=1)
        off = prob_TB.new_zeros(())
        balance = top_share_penalty(prob_TB) if self.phase.alpha else off
        if not self.phase.mu:
            return balance, off
        prob_NCB = prob_TB.unflatten(0, (num_sequences, -1))
        return balance, locality_divergence(prob_NCB, self.phase.nodes, self.phase.leak)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # Gamma is 0-dim, and what has fewer than two dimensions does not decay.
        return optimizer_of(self.trained, self.phase.fit)


def mean_notes(record_L: list[RoutingRecord]) -> dict[str, Tensor]:
    """By name, what the selections of all layers noted, averaged."""
    names = dict.fromkeys(name for record in record_L for name in record.notes)
    return {name: torch.stack([record.notes[name] for record in record_L]).mean() for name in names}


@torch.no_grad()
def separation(model: PreTrainedModel, calibration: Calibration | None) -> dict[str, list[float]]:
    """Per layer, how apart the calibration tokens of different best blocks lie in the model as it is now, in eval mode.

    CH index and mean cosine of two tokens of a block (see `sparse.separation`); empty without calibration.
    """
    if calibration is None:
        return {}
    num_windows = max(1, _SEPARATION_TOKENS * calibration.num_windows // calibration.num_tokens)
    model.eval()
    with capture_layer_inputs(model) as inputs:
        forward(model, calibration.windows(0, num_windows))
    index_L, correlation_L = [], []
    for layer, x_TD in zip(sparse_layers(model), inputs, strict=True):
        assert layer.score is not None
        block_T = layer.score(x_TD, layer.experts).argmax(dim=1)
        index_L.append(ch_index(x_TD, block_T, layer.experts.num_blocks))
        correlation_L.append(token_correlation(x_TD, block_T, layer.experts.num_blocks))
    return {"ch_index_L": index_L, "token_correlation_L": correlation_L}


def learned_state(model: PreTrainedModel) -> dict[str, list[Any]]:
    """What training left beside the weights, per layer: gamma, and per block the averages that inference uses."""
    facts: dict[str, list[Any]] = {}
    for layer in sparse_layers(model):
        if isinstance(layer.combine, SoftmaxCombineModule) and layer.combine.gamma is not None:
            facts.setdefault("gamma_L", []).append(layer.combine.gamma.item())
        if isinstance(layer.select_state, ResonanceState):
            facts.setdefault("kept_ratio_LB", []).append(layer.select_state.kept_ratio_B.tolist())
            factor_B = layer.select_state.capacity.log_factor_B.exp()
            facts.setdefault("capacity_factor_LB", []).append(factor_B.tolist())
    return facts
