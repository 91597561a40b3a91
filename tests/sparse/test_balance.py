"""Importance and load: closed forms at the limits, the load against drawing the noise again, gradients."""

import pytest
import torch
from torch import Tensor

from moesaic.sparse.balance import (
    load,
    locality_divergence,
    max_violation,
    selected_softmax,
    squared_variation,
    top_share_penalty,
)
from moesaic.sparse.select import TopK


def draws(num_tokens: int = 40, num_blocks: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Clean logits, noise, and the noise's standard deviation, which differs by token and block."""
    generator = torch.Generator().manual_seed(0)
    clean_TB = torch.randn(num_tokens, num_blocks, generator=generator)
    std_TB = 0.2 + torch.rand(num_tokens, num_blocks, generator=generator)
    return clean_TB, std_TB * torch.randn(num_tokens, num_blocks, generator=generator), std_TB


def test_variation_is_zero_when_balanced_and_the_number_of_blocks_when_all_is_on_one() -> None:
    assert squared_variation(torch.full((8,), 3.0)).item() == 0
    for num_blocks in (2, 8):
        one_B = torch.zeros(num_blocks)
        one_B[1] = 7.0
        assert squared_variation(one_B).item() == pytest.approx(num_blocks)
    # So two terms weighted by 0.01 never exceed 0.16 for eight blocks.
    assert squared_variation(torch.zeros(8)).item() == 0


def test_selected_softmax_is_that_of_the_selected_logits_alone() -> None:
    clean_TB, _, _ = draws()
    active_TB = TopK(k=3)(clean_TB).active_TB()
    share_TB = selected_softmax(clean_TB, active_TB)
    for token in range(len(clean_TB)):
        chosen = active_TB[token]
        torch.testing.assert_close(share_TB[token][chosen], clean_TB[token][chosen].softmax(0))
        assert (share_TB[token][~chosen] == 0).all()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_load_is_the_frequency_of_the_top_k_when_one_blocks_noise_is_drawn_again(k: int) -> None:
    clean_TB, noise_TB, std_TB = draws(num_tokens=6)
    generator = torch.Generator().manual_seed(1)
    num_draws, expected_B = 20_000, torch.zeros(6)
    for block in range(6):
        noisy_RTB = (clean_TB + noise_TB).repeat(num_draws, 1, 1)
        fresh_RT = torch.randn(num_draws, 6, generator=generator)
        noisy_RTB[:, :, block] = clean_TB[:, block] + std_TB[:, block] * fresh_RT
        chosen_RTB = noisy_RTB >= noisy_RTB.topk(k, dim=2).values[:, :, -1:]
        expected_B[block] = chosen_RTB[:, :, block].float().mean(0).sum()
    torch.testing.assert_close(load(clean_TB, noise_TB, std_TB, k), expected_B, atol=0.04, rtol=0)


def test_load_of_all_blocks_is_every_token() -> None:
    clean_TB, noise_TB, std_TB = draws()
    assert load(clean_TB, noise_TB, std_TB, 6).tolist() == [40.0] * 6


def test_the_released_estimator_takes_the_wrong_threshold_where_noise_and_logit_disagree() -> None:
    clean_TB = torch.tensor([[5.0, 0.0, -5.0]])
    noise_TB, std_TB = torch.tensor([[-0.1, 0.2, 0.1]]), torch.ones(1, 3)
    right_B, released_B = (load(clean_TB, noise_TB, std_TB, 1, noise_alone=alone) for alone in (False, True))
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(right_B[0], normal.cdf(torch.tensor(5.0 - 0.2)))
    torch.testing.assert_close(released_B[0], normal.cdf(torch.tensor(5.0 - 4.9)))
    torch.testing.assert_close(right_B[1:], released_B[1:])


def test_the_load_has_a_gradient_for_logits_and_noise() -> None:
    clean_TB, noise_TB, std_TB = (tensor.double() for tensor in draws(num_tokens=5))
    draw_TB = noise_TB / std_TB

    def variation(clean_TB: Tensor, std_TB: Tensor) -> Tensor:
        return load(clean_TB, draw_TB * std_TB, std_TB, 2).var()

    assert torch.autograd.gradcheck(variation, (clean_TB.requires_grad_(), std_TB.requires_grad_()))


def test_the_top_share_penalty_is_one_when_uniform_and_the_number_of_blocks_at_collapse() -> None:
    uniform_TB = torch.eye(8).repeat(5, 1) * 1e-6 + 0.125
    assert top_share_penalty(uniform_TB).item() == pytest.approx(1, abs=1e-5)
    collapsed_TB = torch.zeros(40, 8)
    collapsed_TB[:, 3] = 1
    assert top_share_penalty(collapsed_TB).item() == 8


def test_the_top_share_penalty_against_a_loop() -> None:
    prob_TB = draws()[0].softmax(dim=1).requires_grad_()
    expected = 0.0
    for block in range(6):
        share = sum(int(row.argmax()) == block for row in prob_TB) / 40
        expected += 6 * share * prob_TB[:, block].mean().item()
    penalty = top_share_penalty(prob_TB)
    assert penalty.item() == pytest.approx(expected, rel=1e-6)
    penalty.backward()
    assert prob_TB.grad is not None
    assert prob_TB.grad.abs().sum() > 0


@pytest.mark.parametrize(("nodes", "leak", "expected"), [(2, 0.01, 1.6145), (2, 0.1, 0.5108), (1, 0.01, 0.0)])
def test_the_locality_of_uniform_probabilities(nodes: int, leak: float, expected: float) -> None:
    prob_NCB = torch.full((4, 10, 8), 0.125)
    assert locality_divergence(prob_NCB, nodes, leak).item() == pytest.approx(expected, abs=1e-4)


def test_local_tokens_have_no_divergence_and_foreign_ones_have_the_most() -> None:
    local_B = torch.tensor([0.99 / 4] * 4 + [0.01 / 4] * 4)
    own = torch.stack([local_B.expand(10, 8), local_B.flip(0).expand(10, 8)])
    assert locality_divergence(own, 2, 0.01).item() == pytest.approx(0, abs=1e-6)
    assert locality_divergence(own.flip(0), 2, 0.01) > locality_divergence(torch.full((2, 10, 8), 0.125), 2, 0.01)
    certain = torch.zeros(2, 10, 8)
    certain[..., 0] = 1
    assert locality_divergence(certain, 2, 0.01).isfinite()


@pytest.mark.parametrize("nodes", [3, 8])
def test_nodes_that_cannot_share_are_refused(nodes: int) -> None:
    with pytest.raises(ValueError, match=f"nodes={nodes} cannot share 8 blocks and 4 sequences"):
        locality_divergence(torch.full((4, 10, 8), 0.125), nodes, 0.01)


def test_the_largest_violation_of_balance() -> None:
    assert max_violation(torch.tensor([4, 4, 4])).item() == 0
    assert max_violation(torch.tensor([9, 3, 0])).item() == pytest.approx(1.25)
