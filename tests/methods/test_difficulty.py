"""Figures about levels, on cases counted by hand."""

import math

import pytest
import torch

from moesaic.methods.difficulty import (
    agreement,
    difficulty_shares,
    label_histograms,
    level_frequencies,
    next_token_losses,
)


def test_agreement_by_hand():
    label_T = torch.tensor([0, 0, 0, 0, 0, 0, 2, 3])
    choice_T = torch.tensor([0, 0, 0, 1, 2, 0, 3, 0])
    figures = agreement(choice_T, label_T, 4)
    assert figures["top1"] == pytest.approx(4 / 8)
    assert figures["within_one"] == pytest.approx(6 / 8)
    assert figures["balanced"] == pytest.approx((4 / 6 + 0 + 0) / 3)
    assert figures["prior"] == pytest.approx(6 / 8)


def test_shares_by_quarter_of_the_loss_leave_out_what_has_none():
    loss_T = torch.tensor([4.0, math.nan, 1.0, 3.0, 2.0])
    assert difficulty_shares(torch.tensor([0.4, 9.0, 0.1, 0.3, 0.2]), loss_T) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_losses_stand_at_the_token_that_predicts():
    logits_NCV = torch.zeros(2, 3, 4)
    logits_NCV[0, 1, 2] = 50.0
    loss_T = next_token_losses(logits_NCV, torch.tensor([[0, 1, 2], [3, 3, 3]]))
    assert loss_T[[0, 1, 3, 4]].tolist() == pytest.approx([math.log(4), 0.0, math.log(4), math.log(4)], abs=1e-6)
    assert loss_T[[2, 5]].isnan().all()


def test_histograms_by_theta_and_layer():
    score_TE = torch.tensor([[0.2, 0.6, 1.0], [0.7, 0.8, 1.0], [0.1, 0.2, 1.0], [0.6, 0.9, 1.0]])
    assert level_frequencies(torch.tensor([0, 2, 2, 2]), 4) == [0.25, 0.0, 0.75, 0.0]
    found = label_histograms([score_TE], (0.5, 0.75), "first_above")
    assert found == {"0.5": [[0.5, 0.25, 0.25]], "0.75": [[0.0, 0.5, 0.5]]}
