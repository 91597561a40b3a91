"""Deja Vu's predictors: labels, the weighted loss, what is kept, and a rule that they can learn."""

from __future__ import annotations

import pytest
import torch
from methods.toy import ids_NC, toy_conversion, toy_job, weights
from torch.nn import functional as F
from toy_ffns import random_ffn, random_inputs

from moesaic.methods.base import SparseMethod, select_blocks
from moesaic.methods.deja_vu import TrainPredictors, active_labels, break_even_recall, precision_recall, prediction_loss
from moesaic.sparse.combine import Combine
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.low_rank import LowRank
from moesaic.sparse.partition import BlocksOfSize
from moesaic.sparse.score import Oracle
from moesaic.sparse.top_share import TopShare
from moesaic.training.fit import FitConfig

FIT = FitConfig(steps=60, batch_size=64, lr=1e-2, clip_norm=None, weight_decay=0.01)


def method(block_size: int = 1, rank_frac: float = 0.5) -> SparseMethod:
    return SparseMethod(
        name="deja_vu",
        partition=BlocksOfSize(block_size=block_size),
        score=LowRank(rank_frac=rank_frac),
        select=TopShare(active_frac=0.5),
        combine=Combine(),
        oracle=Oracle(target="output_norm"),
        adapt_each_budget=True,
        calibration_tokens=512,
    )


def experts_of(block_size: int, **ffn) -> Experts:
    return Experts.from_dense(random_ffn(**ffn), torch.arange(24) // block_size)


def test_labels_of_a_relu_model_are_its_active_neurons_or_blocks_with_one():
    x_TD = random_inputs(40)
    active_TF = experts_of(1, gated=False).dense_ffn().hidden(x_TD) > 0
    assert torch.equal(active_labels(experts_of(1, gated=False), x_TD, 0.3), active_TF)
    blocks_TB = active_labels(experts_of(4, gated=False), x_TD, 0.3)
    assert torch.equal(blocks_TB, active_TF.unflatten(1, (6, 4)).any(2))


def test_labels_without_exact_zeros_are_the_largest_share():
    x_TD = random_inputs(40)
    h_TF = experts_of(1).dense_ffn().hidden(x_TD).abs()
    label_TF = active_labels(experts_of(1), x_TD, 0.25)
    assert (label_TF.sum(1) == 6).all()
    assert (h_TF.masked_fill(~label_TF, torch.inf).amin(1) >= h_TF.masked_fill(label_TF, 0).amax(1)).all()
    assert (active_labels(experts_of(4), x_TD, 0.5).sum(1) == 3).all()


def test_a_negative_weighs_the_density_plus_a_constant():
    label_TB = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).bool()
    logits_TB = torch.tensor([[0.3, -1.0, 2.0, 0.5]])
    each_TB = F.binary_cross_entropy_with_logits(logits_TB, label_TB.float(), reduction="none")
    weight_TB = torch.tensor([[1.0, 0.255, 0.255, 0.255]])
    assert prediction_loss(logits_TB, label_TB).item() == pytest.approx((weight_TB * each_TB).mean().item())


def test_precision_and_recall_by_hand():
    predicted_TB = torch.tensor([[True, True, False], [True, True, False]])
    label_TB = torch.tensor([[True, False, True], [True, False, True]])
    assert precision_recall(predicted_TB, label_TB) == (0.5, 0.5)
    assert precision_recall(torch.ones(2, 3, dtype=torch.bool), label_TB) == (2 / 3, 1.0)
    assert precision_recall(torch.zeros(2, 3, dtype=torch.bool), label_TB) == (1.0, 0.0)


def test_a_predictor_that_fires_everywhere_gains_no_break_even_recall():
    label_TB = torch.tensor([[True, False, True, False]])
    logits_TB = torch.tensor([[3.0, 2.0, 1.0, 0.5]])
    assert break_even_recall(logits_TB, label_TB) == break_even_recall(logits_TB - 9, label_TB) == 0.5
    assert break_even_recall(torch.tensor([[3.0, 1.0, 2.0, 0.5]]), label_TB) == 1.0
    assert break_even_recall(logits_TB, torch.zeros(1, 4, dtype=torch.bool)) == 1.0


def test_a_full_rank_predictor_learns_a_linear_rule(tmp_path):
    # The toy OPT has no up bias, so which neurons are active is a linear rule of the input.
    _, model, calibration = toy_conversion(method(rank_frac=1.0), tmp_path, family="opt")
    fit = FitConfig(steps=500, batch_size=128, lr=3e-2, clip_norm=None)
    phase = TrainPredictors(fit=fit, label_frac=0.5, held_out_frac=0.1)
    facts = phase.run(toy_job(model, calibration, tmp_path / "fit"))
    assert min(facts["break_even_recall_L"]) > 0.97
    assert min(facts["recall_L"]) > 0.97
    assert min(facts["precision_L"]) > 0.95
    assert all(0.2 < density < 0.8 for density in facts["label_density_L"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("block_size", [1, 8])
def test_training_finds_more_than_the_start_and_changes_only_predictors(tmp_path, family, block_size):
    _, model, calibration = toy_conversion(method(block_size), tmp_path, family=family)
    before, weights_before = recall_of(model, calibration), weights(model)
    phase = TrainPredictors(fit=FIT, label_frac=0.5, held_out_frac=0.1)
    facts = phase.run(toy_job(model, calibration, tmp_path / "fit"))
    assert facts["tokens"] == 0
    assert sum(recall_of(model, calibration)) > sum(before) + 0.1
    changed = {name for name, value in weights(model).items() if not torch.equal(value, weights_before[name])}
    assert changed
    assert all(".score." in name for name in changed)


def recall_of(model, calibration) -> list[float]:
    recalls = []
    for index, layer in enumerate(sparse_layers(model)):
        x_TD = calibration.inputs_TD(index)
        active_TB = TopShare(active_frac=0.5)(layer.score(x_TD, layer.experts)).active_TB()
        recalls.append(precision_recall(active_TB, active_labels(layer.experts, x_TD, 0.5))[1])
    return recalls


def test_the_predictor_with_the_best_recall_is_kept(tmp_path):
    # A rate that overshoots: the last predictor is not the best one.
    _, model, calibration = toy_conversion(method(), tmp_path)
    wild = FitConfig(steps=40, batch_size=64, lr=3.0, clip_norm=None)
    phase = TrainPredictors(fit=wild, label_frac=0.5, held_out_frac=0.1, validate_every_steps=5)
    facts = phase.run(toy_job(model, calibration, tmp_path / "fit"))
    again = TrainPredictors(fit=wild, label_frac=0.5, held_out_frac=0.1, validate_every_steps=40)
    _, model, calibration = toy_conversion(method(), tmp_path / "last")
    last = again.run(toy_job(model, calibration, tmp_path / "last/fit"))
    kept_L, last_L = facts["break_even_recall_L"], last["break_even_recall_L"]
    assert all(best >= end for best, end in zip(kept_L, last_L, strict=True))
    assert kept_L != last_L


def test_all_neurons_are_dense(tmp_path):
    dense, model, _ = toy_conversion(method(), tmp_path)
    select_blocks(model, TopShare(active_frac=1.0))
    torch.testing.assert_close(model(ids_NC()).logits, dense(ids_NC()).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("label_frac", [0.0, 1.0])
def test_a_share_that_labels_nothing_or_all_is_refused(label_frac):
    with pytest.raises(ValueError, match=rf"label_frac={label_frac} is outside 0\.\.1"):
        TrainPredictors(fit=FIT, label_frac=label_frac)
