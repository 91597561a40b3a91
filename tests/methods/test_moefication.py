"""MoEfication's router training: its losses, what it keeps, and what it must not touch."""

import pytest
import torch
from methods.toy import toy_conversion, toy_job, weights

from moesaic.methods.base import SparseMethod, select_blocks
from moesaic.methods.moefication import TrainRouters, held_out_rows, router_loss
from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.partition import BalancedKMeans
from moesaic.sparse.score import Centroid, Oracle, TanhMLP
from moesaic.sparse.select import TopK
from moesaic.sparse.targets import captured_mass, expert_targets
from moesaic.training.fit import FitConfig

FIT = FitConfig(steps=60, batch_size=64, lr=1e-2, optimizer="adam", clip_norm=None)


def method(score=None, **changes) -> SparseMethod:
    settings = {
        "name": "moefication",
        "partition": BalancedKMeans(num_blocks=8),
        "score": score or TanhMLP(),
        "select": TopK(k=2),
        "combine": Combine(fill="auto"),
        "oracle": Oracle(target="l1"),
        "adapt_each_budget": True,
        "calibration_tokens": 512,
    }
    return SparseMethod(**{**settings, **changes})


def phase(**changes) -> TrainRouters:
    settings = {
        "fit": FIT,
        "target": "l1",
        "normalise": "quantile",
        "loss": "bce_soft",
        "split": "window",
        "keep": "best",
    }
    return TrainRouters(**{**settings, **changes})


def mass_of(model, calibration, k: int = 2) -> list[float]:
    masses = []
    for index, layer in enumerate(sparse_layers(model)):
        x_TD = calibration.inputs_TD(index)
        active_TB = TopK(k=k)(layer.score(x_TD, layer.experts)).active_TB()
        masses.append(captured_mass(expert_targets(layer.experts, x_TD, "l1"), active_TB))
    return masses


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_training_captures_more_mass_and_changes_no_backbone_weight(tmp_path, family):
    # From a random start: centroids alone are hard to beat on a toy with random weights.
    _, model, calibration = toy_conversion(method(TanhMLP(init="random")), tmp_path, family=family)
    before, weights_before = mass_of(model, calibration), weights(model)
    facts = phase(active_frac=0.25).run(toy_job(model, calibration, tmp_path / "fit"))
    after = mass_of(model, calibration)
    assert sum(after) > sum(before)
    assert len(facts["captured_mass_L"]) == len(after)
    assert facts["tokens"] == 0
    changed = {name for name, value in weights(model).items() if not torch.equal(value, weights_before[name])}
    assert changed
    assert all(".score." in name for name in changed)


def test_the_best_router_seen_is_kept_and_the_released_one_is_second(tmp_path):
    # A rate that overshoots: the last router is not the best one.
    wild = FitConfig(steps=40, batch_size=64, lr=3.0, optimizer="adam", clip_norm=None)
    facts = {}
    for keep in ("best", "second_best"):
        _, model, calibration = toy_conversion(method(), tmp_path / keep)
        job = toy_job(model, calibration, tmp_path / keep / "fit")
        facts[keep] = phase(fit=wild, keep=keep, validate_every_steps=5).run(job)["captured_mass_L"]
    assert all(best >= second for best, second in zip(facts["best"], facts["second_best"], strict=True))
    assert facts["best"] != facts["second_best"]


def test_a_score_without_parameters_is_left_alone(tmp_path):
    _, model, calibration = toy_conversion(method(Centroid()), tmp_path)
    before = weights(model)
    assert phase().run(toy_job(model, calibration, tmp_path / "fit"))["steps"] == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_the_soft_loss_is_least_where_the_sigmoid_meets_the_target():
    target_TB = torch.tensor([[0.2, 0.9]])
    options = {"loss": "bce_soft", "scale": 1.0, "active_frac": 0.5}
    best = router_loss(target_TB.logit(), target_TB, **options)
    entropy = -(target_TB * target_TB.log() + (1 - target_TB) * (1 - target_TB).log()).mean()
    assert best.item() == pytest.approx(entropy.item())
    for shift in (-0.5, 0.5):
        assert router_loss(target_TB.logit() + shift, target_TB, **options) > best


def test_batch_maximum_depends_on_the_batch_and_a_fixed_scale_does_not():
    target_TB, logits_TB = torch.tensor([[1.0, 2.0], [0.5, 0.25]]), torch.zeros(2, 2)
    outlier_TB = torch.cat([target_TB, torch.tensor([[1e6, 0.0]])])
    fixed = {"loss": "mse", "scale": 2.0, "active_frac": 0.5}
    assert torch.isfinite(router_loss(logits_TB, target_TB, **fixed))
    soft = {"loss": "bce_soft", "active_frac": 0.5}
    logits = torch.full((3, 2), 5.0)
    grown = router_loss(logits, outlier_TB, scale=None, **soft)
    # With the outlier as maximum nearly all targets are 0, so confident logits are punished more.
    assert grown > router_loss(logits, outlier_TB, scale=2.0, **soft)


def test_multi_hot_marks_the_best_blocks():
    target_TB = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    right = torch.tensor([[20.0, -20.0, 20.0, -20.0]])
    options = {"loss": "bce_multi_hot", "scale": 1.0, "active_frac": 0.5}
    assert router_loss(right, target_TB, **options).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("split", ["random", "tail", "window"])
def test_held_out_rows(tmp_path, split):
    _, _, calibration = toy_conversion(method(), tmp_path)
    held_T = held_out_rows(calibration, split, 0.25, seed=0)
    assert len(held_T) == 512
    assert 0.15 < held_T.float().mean() < 0.35
    if split == "tail":
        assert held_T[-128:].all()
        assert not held_T[:-128].any()
    if split == "window":
        per_window = held_T.view(-1, 16).float().mean(1)
        assert set(per_window.tolist()) == {0.0, 1.0}


def test_converted_with_all_blocks_is_dense_and_the_oracle_is_never_worse_than_random(tmp_path):
    dense, model, calibration = toy_conversion(method(), tmp_path)
    ids = calibration.windows_NC()[:4]
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-4)
    select_blocks(model, TopK(k=2))
    assert not torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-5)
