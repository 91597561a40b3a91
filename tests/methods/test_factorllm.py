"""FactorLLM's losses against the closed-form values of its specification, and its phases on a toy model."""

import math

import pytest
import torch
from methods.toy import toy_conversion, toy_job, weights

from moesaic.methods.base import SparseMethod, select_blocks
from moesaic.methods.factorllm import (
    JointFinetune,
    LabelRouters,
    balance_penalty,
    fit_scales,
    frozen_copy,
    label_blocks,
    prior_approximate_loss,
    router_loss,
    teacher_distances,
)
from moesaic.sparse.combine import Combine
from moesaic.sparse.labels import block_grams, pa_distances
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.partition import Contiguous
from moesaic.sparse.score import Linear, SubsetOracle
from moesaic.sparse.select import TopK
from moesaic.training.fit import FitConfig


def mask(*values: int) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


@pytest.mark.parametrize(("k", "chosen", "other"), [(1, 0.4754, 0.1749), (2, 0.3655, 0.1345), (3, 0.2969, 0.1092)])
def test_softmax_of_the_label_mask_is_nearly_uniform(k, chosen, other):
    teacher = mask(*[1] * k, *[0] * (4 - k)).softmax(dim=1)[0]
    assert teacher[0].item() == pytest.approx(chosen, abs=5e-5)
    assert teacher[3].item() == pytest.approx(other, abs=5e-5)


@pytest.mark.parametrize(("k", "divergence"), [(1, 0.1074), (2, 0.1201), (3, 0.0780)])
def test_prior_approximate_loss_of_a_uniform_router(k, divergence):
    loss = prior_approximate_loss(torch.zeros(1, 4), mask(*[1] * k, *[0] * (4 - k)))
    assert loss.item() == pytest.approx(divergence, abs=5e-5)


def test_prior_approximate_loss_is_zero_with_zero_gradient_at_a_margin_of_one():
    logits = (mask(1, 1, 0, 0) + 7.0).requires_grad_()
    loss = prior_approximate_loss(logits, mask(1, 1, 0, 0))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.abs().max().item() < 1e-6


def test_prior_approximate_loss_pulls_a_confident_router_back():
    logits = torch.tensor([[3.0, 3.0, 0.0, 0.0]], requires_grad=True)
    loss = prior_approximate_loss(logits, mask(1, 1, 0, 0))
    loss.backward()
    assert loss.item() == pytest.approx(0.1698, abs=5e-5)
    assert logits.grad[0, :2].tolist() == pytest.approx([0.0452, 0.0452], abs=5e-5)


def test_cross_entropy_has_its_optimum_at_confidence():
    uniform = router_loss(torch.zeros(1, 4), mask(1, 1, 0, 0), "cross_entropy")
    sure = router_loss(torch.tensor([[40.0, 40.0, 0.0, 0.0]]), mask(1, 1, 0, 0), "cross_entropy")
    assert uniform.item() == pytest.approx(math.log(4))
    assert sure.item() == pytest.approx(math.log(2))


def test_losses_are_means_over_tokens_however_they_are_arranged():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(256, 4, generator=generator)
    labels = torch.zeros(256, 4).scatter_(1, torch.randn(256, 4, generator=generator).topk(2, dim=1).indices, 1.0)
    halves = [prior_approximate_loss(logits[i::2], labels[i::2]) for i in range(2)]
    assert prior_approximate_loss(logits, labels).item() == pytest.approx(sum(halves).item() / 2, rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_published_balance_penalty_measures_confidence_not_load(k):
    assert balance_penalty(torch.zeros(5, 4), k).item() == pytest.approx(k / 16)
    sure = torch.zeros(6, 4)
    sure[:, 0] = 50.0
    spread = torch.full((6, 4), 0.0)
    spread[torch.arange(6), torch.arange(6) % 4] = 50.0
    assert balance_penalty(sure, k).item() == pytest.approx(0.25, abs=1e-5)
    assert balance_penalty(spread, k).item() == pytest.approx(balance_penalty(sure, k).item())


def factorllm(scale: str = "fitted") -> SparseMethod:
    return SparseMethod(
        name="factorllm",
        partition=Contiguous(num_blocks=4),
        score=Linear(),
        select=TopK(k=2),
        combine=Combine(scale=scale),
        oracle=SubsetOracle(),
        adapt_each_budget=True,
        calibration_tokens=512,
    )


@pytest.mark.parametrize("criterion", ["pa", "pa_unscaled", "subset_oracle", "output_norm", "l1"])
def test_the_router_phase_learns_its_labels_and_changes_nothing_else(tmp_path, criterion):
    _, model, calibration = toy_conversion(factorllm(), tmp_path)
    select_blocks(model, TopK(k=2))
    before = weights(model)
    agreed_before = agreement(model, calibration, criterion)
    phase = LabelRouters(fit=FitConfig(steps=60, batch_size=8, lr=3e-2), criterion=criterion, loss="cross_entropy")
    facts = phase.run(toy_job(model, calibration, tmp_path / "fit"))
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert all(".score." in name or name.endswith("scale_X") for name in changed)
    assert agreement(model, calibration, criterion) > agreed_before
    assert facts["tokens"] == 0
    assert {layer.select for layer in sparse_layers(model)} == {TopK(k=2)}


def agreement(model, calibration, criterion) -> float:
    """Share of labelled blocks that the routers choose, over layers and tokens."""
    shares = []
    for index, layer in enumerate(sparse_layers(model)):
        x_TD = calibration.inputs_TD(index)
        wanted_TB = label_blocks(layer.experts, x_TD, 2, criterion)
        shares.append((wanted_TB & layer.route(x_TD)[0].active_TB()).sum().item() / wanted_TB.sum().item())
    return sum(shares) / len(shares)


def test_fitted_scales_minimise_the_error_of_each_k(tmp_path):
    _, model, calibration = toy_conversion(factorllm(), tmp_path)
    fit_scales(model, calibration)
    layer, x_TD = sparse_layers(model)[0], calibration.inputs_TD(0)
    dense_TD = layer.experts.dense_ffn()(x_TD)
    assert layer.combine.scale_X[4].item() == pytest.approx(1.0, abs=1e-5)
    for k in (1, 2, 3):
        layer.select = TopK(k=k)
        best = (layer(x_TD) - dense_TD).square().sum()
        for factor in (0.98, 1.02):
            with torch.no_grad():
                layer.combine.scale_X[k] *= factor
                assert (layer(x_TD) - dense_TD).square().sum() > best
                layer.combine.scale_X[k] /= factor


def test_a_learned_scale_starts_at_the_fitted_one(tmp_path):
    _, fitted, calibration = toy_conversion(factorllm("fitted"), tmp_path / "a")
    _, learned, _ = toy_conversion(factorllm("learned"), tmp_path / "b")
    for model in (fitted, learned):
        select_blocks(model, TopK(k=2))
        fit_scales(model, calibration)
    for one, other in zip(sparse_layers(fitted), sparse_layers(learned), strict=True):
        assert other.combine.scale.item() == pytest.approx(one.combine.scale_X[2].item())


def test_teacher_distances_of_a_frozen_teacher_equal_the_gram_form_while_blocks_are_slices(tmp_path):
    _, model, calibration = toy_conversion(factorllm(), tmp_path)
    experts, x_TD = sparse_layers(model)[0].experts, calibration.inputs_TD(0)
    direct_TB = teacher_distances(experts, frozen_copy(experts), x_TD, 0.5)
    torch.testing.assert_close(
        direct_TB, pa_distances(block_grams(experts, x_TD), 0.5, experts.dim), atol=1e-7, rtol=1e-3
    )


def test_joint_training_moves_routers_and_experts_but_not_the_teacher(tmp_path):
    _, model, calibration = toy_conversion(factorllm("floor_ratio"), tmp_path)
    select_blocks(model, TopK(k=2))
    before = weights(model)
    phase = JointFinetune(fit=FitConfig(steps=4, batch_size=4, lr=1e-2), router_weight=0.05, confidence_weight=0.01)
    phase.run(toy_job(model, calibration, tmp_path / "fit"))
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert any(".score." in name for name in changed)
    assert any(".experts." in name for name in changed)
    assert all(".score." in name or ".experts." in name for name in changed)
