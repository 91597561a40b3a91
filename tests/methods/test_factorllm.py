"""FactorLLM's losses against the closed-form values of its specification, and its phases on a toy model."""

import math

import pytest
import torch

from moesaic.methods.factorllm import balance_penalty, prior_approximate_loss, router_loss


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
