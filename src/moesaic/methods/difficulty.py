"""Figures about levels: how often each is right, and for which tokens.

Shapes: L layers, T tokens, E levels, N rows, C tokens in a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.sparse.similarity import LabelRule, label_levels

__all__ = ["agreement", "difficulty_shares", "label_histograms", "level_frequencies", "next_token_losses"]


def agreement(choice_T: Tensor, label_T: Tensor, num_levels: int) -> dict[str, float]:
    """Shares of tokens: top1, within_one level, balanced (mean recall of the levels that occur), and prior.

    `prior` is what the most frequent label alone would give: a router that is no better has learned nothing.
    """
    right_T = choice_T == label_T
    counts_E = torch.bincount(label_T, minlength=num_levels)
    hits_E = torch.bincount(label_T[right_T], minlength=num_levels)
    occurs_E = counts_E > 0
    return {
        "top1": right_T.float().mean().item(),
        "within_one": ((choice_T - label_T).abs() <= 1).float().mean().item(),
        "balanced": (hits_E[occurs_E] / counts_E[occurs_E]).mean().item(),
        "prior": (counts_E.max() / len(label_T)).item(),
    }


def difficulty_shares(share_T: Tensor, loss_T: Tensor) -> list[float]:
    """The mean share of each quarter of the tokens, by rising loss; tokens without a loss (NaN) are left out."""
    known_T = ~loss_T.isnan()
    order_T = loss_T[known_T].argsort()
    return [part_T.mean().item() for part_T in share_T[known_T][order_T].tensor_split(4)]


def next_token_losses(logits_NCV: Tensor, ids_NC: Tensor) -> Tensor:
    """(N * C,) nats: the loss of predicting each token's successor; NaN for the last of a row, which has none."""
    loss_NC = F.cross_entropy(logits_NCV[:, :-1].float().transpose(1, 2), ids_NC[:, 1:], reduction="none")
    return F.pad(loss_NC, (0, 1), value=math.nan).flatten()


def level_frequencies(level_T: Tensor, num_levels: int) -> list[float]:
    """The share of tokens of each level, to four digits."""
    return [round(count / len(level_T), 4) for count in torch.bincount(level_T, minlength=num_levels).tolist()]


def label_histograms(
    score_LTE: Sequence[Tensor], thetas: Sequence[float], rule: LabelRule
) -> dict[str, list[list[float]]]:
    """By theta, per layer, the share of tokens with each level as their label."""
    return {
        f"{theta:.4g}": [
            level_frequencies(label_levels(score_TE, theta, rule), score_TE.shape[1]) for score_TE in score_LTE
        ]
        for theta in thetas
    }
