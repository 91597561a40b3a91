"""CATS on a toy model: thresholds from calibration that hold on other tokens, and nothing trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.toy import ids_NC, toy_conversion, toy_job, weights

from moesaic.methods.base import SparseMethod, select_blocks
from moesaic.methods.cats import FitQuantiles, sample_scores
from moesaic.methods.controls import apply_arm
from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import set_budget, sparse_layers
from moesaic.sparse.magnitude import GateMagnitude, Quantile, exact_quantiles
from moesaic.sparse.partition import BlocksOfSize
from moesaic.sparse.score import Oracle
from moesaic.sparse.select import TopK
from moesaic.sparse.trace import count_routing

METHOD = SparseMethod(
    name="cats",
    partition=BlocksOfSize(block_size=1),
    score=GateMagnitude(),
    select=Quantile(p=0.5, prefill_dense_share=0.0),
    combine=Combine(),
    oracle=Oracle(target="output_norm"),
    adapt_each_budget=True,
    budgets=(0.3, 0.5, 0.7),
    calibration_tokens=512,
)


def adapted(folder: Path, family: str = "llama", **settings) -> tuple:
    """A dense toy, the same one with thresholds, the calibration, and what the phase reported."""
    dense, model, calibration = toy_conversion(METHOD, folder, family=family)
    select_blocks(model, METHOD.select)
    phase = FitQuantiles(**{"estimate": "exact", **settings})
    return dense, model, calibration, phase.run(toy_job(model, calibration, folder / "fit"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_one_calibration_serves_every_budget_and_changes_no_weight(tmp_path, family):
    dense, model, _, facts = adapted(tmp_path, family)
    assert facts["tokens"] == 0
    assert len(facts["median_score_L"]) == len(sparse_layers(model))
    before = weights(model)
    off = {}
    for p in (0.5, 0.7, 0.9):
        set_budget(model, p)
        with count_routing(model) as counts:
            model(ids_NC(16))
        off[p] = [1 - share for share in counts.active_frac_L()]
    # Only the first layer still sees the inputs that it was calibrated on.
    assert all(off[p][0] == pytest.approx(p, abs=0.05) for p in off)
    assert all(least < middle < most for least, middle, most in zip(*off.values(), strict=True))
    set_budget(model, 0.0)
    torch.testing.assert_close(model(ids_NC()).logits, dense(ids_NC()).logits, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_the_first_layer_keeps_the_share_on_the_calibration_tokens_themselves(tmp_path):
    _, model, calibration, _ = adapted(tmp_path)
    for index, layer in enumerate(sparse_layers(model)):
        routing, _ = layer.route(calibration.inputs_TD(index))
        assert routing.active_TB().float().mean().item() == pytest.approx(0.5, abs=1e-3)


def test_a_reservoir_is_a_sample_of_all_scores(tmp_path):
    _, model, calibration = toy_conversion(METHOD, tmp_path)
    layer, x_TD = sparse_layers(model)[0], calibration.inputs_TD(0)
    every_N = sample_scores(layer, x_TD, 10**6, torch.Generator())
    some_N = sample_scores(layer, x_TD, 6000, torch.Generator().manual_seed(0))
    assert len(every_N) == len(x_TD) * 48
    assert len(some_N) == 6000
    assert torch.isin(some_N, every_N).all()
    for quantile in (300, 500, 700):
        low, high = exact_quantiles(every_N)[[quantile - 25, quantile + 25]]
        assert low <= exact_quantiles(some_N)[quantile] <= high


def test_the_released_histogram_agrees_where_gates_are_small(tmp_path):
    _, _, _, exact = adapted(tmp_path / "exact")
    _, _, _, released = adapted(tmp_path / "released", estimate="histogram")
    assert released["median_score_L"] == pytest.approx(exact["median_score_L"], abs=2.1e-4)


def test_a_rule_without_quantiles_is_refused(tmp_path):
    _, model, calibration = toy_conversion(METHOD, tmp_path)
    select_blocks(model, TopK(k=3))
    with pytest.raises(ValueError, match=r"select=TopK\(k=3.*Select moesaic.sparse.magnitude.Quantile"):
        FitQuantiles(estimate="exact").run(toy_job(model, calibration, tmp_path / "fit"))


@pytest.mark.parametrize("arm", ["oracle_router", "random_router"])
def test_controls_run_as_many_neurons_as_the_thresholds(tmp_path, arm):
    _, model, calibration = toy_conversion(METHOD, tmp_path)
    share_L = [0.4] * len(sparse_layers(model))
    apply_arm(model, arm, METHOD, 0.5, calibration, 0, active_frac_L=share_L)
    for index, layer in enumerate(sparse_layers(model)):
        routing, _ = layer.route(calibration.inputs_TD(index))
        assert routing.active_TB().float().mean().item() == pytest.approx(0.4, abs=0.01)


def test_the_number_of_blocks_follows_from_the_width():
    assert METHOD.for_width(48).blocks == 48
    with pytest.raises(ValueError, match=r"k=99 exceeds partition.num_blocks=48"):
        SparseMethod(
            name="wide",
            partition=BlocksOfSize(block_size=1),
            score=GateMagnitude(),
            select=TopK(k=99),
            combine=Combine(),
            oracle=Oracle(target="l1"),
            adapt_each_budget=True,
        ).check_width(48)
