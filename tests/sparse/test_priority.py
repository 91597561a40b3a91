"""Expert preferred routing: capacities in closed form, counts, and its dependence on later tokens."""

import pytest
import torch

from moesaic.sparse.priority import PriorityLevels, level_capacities, preferred_levels
from moesaic.sparse.select import RoutingContext


@pytest.mark.parametrize(
    ("share_E", "expected"),
    [
        ((0.125, 0.25, 0.5, 1.0), (0.2326, 0.2312, 0.2462, 0.2900)),
        ((0.25, 0.5, 0.75, 1.0), (0.4239, 0.2736, 0.1811, 0.1214)),
    ],
)
def test_capacities_at_half_of_the_ffn(share_E, expected):
    capacity_E = level_capacities(share_E, 0.5)
    assert capacity_E == pytest.approx(expected, abs=1e-4)
    assert sum(capacity_E) == pytest.approx(1)
    assert sum(c * w for c, w in zip(capacity_E, share_E, strict=True)) == pytest.approx(0.5)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_capacities_reach_the_ends(share):
    capacity_E = level_capacities((0.25, 0.5, 0.75, 1.0), share)
    assert sum(c * w for c, w in zip(capacity_E, (0.25, 0.5, 0.75, 1.0), strict=True)) == pytest.approx(share, abs=1e-3)


def test_a_share_below_the_smallest_level_is_refused():
    with pytest.raises(ValueError, match=r"mean_share=0\.1 cannot be reached: levels run 0\.25\.\.1"):
        level_capacities((0.25, 1.0), 0.1)
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        PriorityLevels(mean_share=1.5)


def test_levels_are_filled_from_the_largest_down():
    preference_NCE = torch.rand(3, 10, 4, generator=torch.Generator().manual_seed(0))
    level_NC = preferred_levels(preference_NCE, (0.4, 0.3, 0.2, 0.1))
    for n in range(3):
        assert level_NC[n].bincount(minlength=4).tolist() == [4, 3, 2, 1]
        free = set(range(10))
        for level, count in ((3, 1), (2, 2), (1, 3)):
            chosen = sorted(free, key=lambda t: -float(preference_NCE[n, t, level]))[:count]
            assert set((level_NC[n] == level).nonzero()[:, 0].tolist()) == set(chosen)
            free -= set(chosen)


def test_a_capacity_is_not_lost_to_rounding():
    assert (preferred_levels(torch.rand(1, 100, 2), (0.71, 0.29)) == 1).sum() == 29


def test_a_later_token_can_take_the_place_of_an_earlier_one():
    rule = PriorityLevels(levels=(1, 2), mean_share=0.75)
    score_TE = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.5]])
    context = RoutingContext(num_blocks=2)
    before_T = rule(score_TE, context).count_T()
    score_TE[2:, 1] = 9.0
    assert not rule.causal
    assert before_T.tolist() == [2, 1, 1, 2]
    assert rule(score_TE, context).count_T().tolist() == [1, 1, 2, 2]


def test_sequences_do_not_compete():
    rule = PriorityLevels(levels=(1, 2), mean_share=0.75)
    score_TE = torch.randn(12, 2, generator=torch.Generator().manual_seed(1))
    both_T = rule(score_TE, RoutingContext(num_blocks=2, num_sequences=2)).count_T()
    halves = [rule(half, RoutingContext(num_blocks=2)).count_T() for half in score_TE.split(6)]
    assert torch.equal(both_T, torch.cat(halves))
