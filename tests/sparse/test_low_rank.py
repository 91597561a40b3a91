"""The low-rank predictor: one linear map, and how many numbers it holds."""

from __future__ import annotations

import pytest
import torch
from torch import Generator
from toy_ffns import random_experts, random_ffn, random_inputs

from moesaic.sparse.low_rank import LowRank

EXPERTS = random_experts(random_ffn(), 24)


@pytest.mark.parametrize(("rank_frac", "rank"), [(0.01, 1), (0.125, 1), (0.5, 4), (1.0, 8)])
def test_it_is_linear_of_the_asked_rank(rank_frac, rank) -> None:
    score = LowRank(rank_frac=rank_frac).build(8, 24)
    score.initialise(EXPERTS, None, generator=Generator().manual_seed(0))
    assert sum(weight.numel() for weight in score.parameters()) == rank * (8 + 24)
    map_BD = score(torch.eye(8), EXPERTS).mT
    assert torch.linalg.matrix_rank(map_BD) == rank
    x_TD = random_inputs(5)
    torch.testing.assert_close(score(3 * x_TD, EXPERTS), 3 * x_TD @ map_BD.mT)


def test_at_full_rank_any_linear_map_can_be_held() -> None:
    wanted_BD = random_inputs(24)
    score = LowRank(rank_frac=1.0).build(8, 24)
    with torch.no_grad():
        score.in_RD.copy_(torch.eye(8))
        score.out_BR.copy_(wanted_BD)
    x_TD = random_inputs(5, seed=2)
    torch.testing.assert_close(score(x_TD, EXPERTS), x_TD @ wanted_BD.mT)


def test_scores_are_float32_for_half_precision_inputs() -> None:
    score = LowRank().build(8, 24)
    score.initialise(EXPERTS, None, generator=Generator().manual_seed(0))
    x_TD = random_inputs(5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score(x_TD, EXPERTS), score(x_TD.float(), EXPERTS))


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"score\.rank_frac=0 must be above 0"):
        LowRank(rank_frac=0)
