"""Deja Vu: predictors trained to tell which neurons, or blocks of them, of the frozen dense FFN will be active.

Source: arXiv:2310.17157 and github.com/FMInference/DejaVu (`sparse_predictor`); see conf/method/deja_vu.yaml.
Shapes: L layers, T tokens, D model dim, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.methods.base import AdaptJob, Phase
from moesaic.methods.lm import train_only
from moesaic.methods.moefication import JudgedRouters, held_out_rows, router_batches
from moesaic.sparse.combine import EXACT_ZEROS
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN
from moesaic.sparse.select import top_blocks
from moesaic.sparse.targets import expert_targets
from moesaic.training.fit import FitConfig, fit

__all__ = [
    "ActivityPrediction",
    "TrainPredictors",
    "active_labels",
    "break_even_recall",
    "precision_recall",
    "prediction_loss",
]

_NEGATIVE_WEIGHT = 0.005  # added to the density, so that labels without any positive still teach


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPredictors(Phase):
    """Train every layer's predictor on the cached inputs of the dense model; no other weight changes.

    A block's label is whether any of its neurons is active; where activations have no exact zeros (SiLU, GELU), whether
    it is in the token's top `label_frac` of blocks by sum of |h|. The predictor with the best recall on held-out
    windows is kept, judged at as many predicted as labelled pairs.
    Differs: recall above a fixed probability, as published, keeps predictors that fire everywhere; logits in place of
    probabilities in the loss, steps in place of epochs, no early stop.
    """

    fit: FitConfig
    label_frac: float  # 0..1
    held_out_frac: float = 0.05
    validate_every_steps: int = 50

    trains_weights: ClassVar[bool] = False
    uses_selection: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.label_frac < 1:
            raise ValueError(f"label_frac={self.label_frac} is outside 0..1 (both excluded), the share called active")

    def run(self, job: AdaptJob) -> dict[str, Any]:
        assert job.calibration is not None
        train_only(job.model, ("router",), job.pattern)
        held_T = held_out_rows(job.calibration, "window", self.held_out_frac, job.seed)
        inputs = [job.calibration.inputs_TD(layer) for layer in range(job.calibration.num_layers)]
        module = ActivityPrediction(job.model, self, [x_TD[held_T] for x_TD in inputs])
        batches = router_batches([x_TD[~held_T] for x_TD in inputs], self.fit, job.seed)
        result = fit(module, batches, self.fit, folder=job.folder, label=job.label)
        module.validate()
        break_even_L = module.restore("best")
        facts = {"tokens": 0, "steps": result.steps, "wall_seconds": result.seconds}
        return {**facts, "break_even_recall_L": break_even_L, **module.judgement()}


class ActivityPrediction(JudgedRouters):
    """Predictors of activity; judged by the recall of as many pairs as are active."""

    def __init__(self, model: PreTrainedModel, phase: TrainPredictors, held_LTD: list[Tensor]) -> None:
        super().__init__(model, phase.fit, held_LTD, phase.validate_every_steps)
        self.label_frac = phase.label_frac

    def layer_loss(self, index: int, x_TD: Tensor) -> Tensor:
        layer = self.layers[index]
        return prediction_loss(self.logits(layer, x_TD), active_labels(layer.experts, x_TD, self.label_frac))

    def merit(self, layer: SparseFFN, x_TD: Tensor) -> float:
        return break_even_recall(self.logits(layer, x_TD), active_labels(layer.experts, x_TD, self.label_frac))

    @torch.no_grad()
    def judgement(self) -> dict[str, list[float]]:
        """Precision and recall of what the present predictors find likely, and the density of labels, per layer."""
        facts: dict[str, list[float]] = {"precision_L": [], "recall_L": [], "label_density_L": []}
        for layer, x_TD in zip(self.layers, self.held_LTD, strict=True):
            label_TB = active_labels(layer.experts, x_TD, self.label_frac)
            precision, recall = precision_recall(self.logits(layer, x_TD) > 0, label_TB)
            facts["precision_L"].append(precision)
            facts["recall_L"].append(recall)
            facts["label_density_L"].append(label_TB.float().mean().item())
        return facts


def active_labels(experts: Experts, x_TD: Tensor, label_frac: float) -> Tensor:
    """Boolean (T, B): the blocks with an active neuron, or without exact zeros the round(label_frac * B) largest."""
    mass_TB = expert_targets(experts, x_TD, "l1")
    if experts.activation in EXACT_ZEROS:
        return mass_TB > 0
    best_TK = top_blocks(mass_TB, max(1, round(label_frac * experts.num_blocks)))
    return torch.zeros_like(mass_TB, dtype=torch.bool).scatter(1, best_TK, True)


def prediction_loss(logits_TB: Tensor, label_TB: Tensor) -> Tensor:
    """Mean cross-entropy over tokens and blocks; positives weigh 1, negatives the share of positives + 0.005."""
    positive_TB = label_TB.float()
    negative = positive_TB.mean() + _NEGATIVE_WEIGHT
    weight_TB = positive_TB * (1 - negative) + negative
    return F.binary_cross_entropy_with_logits(logits_TB, positive_TB, weight=weight_TB)


def break_even_recall(logits_TB: Tensor, label_TB: Tensor) -> float:
    """The labelled share of the highest logits, as many as there are labelled pairs: recall and precision at once."""
    count = int(label_TB.sum())
    if not count:
        return 1.0
    return label_TB.flatten()[logits_TB.flatten().topk(count).indices].float().mean().item()


def precision_recall(predicted_TB: Tensor, label_TB: Tensor) -> tuple[float, float]:
    """The share of predicted pairs that are labelled, and of labelled pairs that are predicted; 1 where none is."""
    hits, predicted, labelled = (int(pairs.sum()) for pairs in (predicted_TB & label_TB, predicted_TB, label_TB))
    return hits / predicted if predicted else 1.0, hits / labelled if labelled else 1.0
