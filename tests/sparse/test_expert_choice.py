"""Expert choice against a loop over blocks: equal loads, in a sequence or in the batch."""

import pytest
import torch

from moesaic.sparse.expert_choice import ExpertChoice
from moesaic.sparse.select import RoutingContext


def scores(tokens=48, blocks=4):
    return torch.randn(tokens, blocks, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
@pytest.mark.parametrize("blocks_per_token", [0.5, 1.0, 2.0, 4.0])
def test_every_block_takes_its_best_tokens(scope, blocks_per_token):
    score_TB = scores()
    context = RoutingContext(num_blocks=4, num_sequences=3)
    active_TB = ExpertChoice(blocks_per_token=blocks_per_token, scope=scope)(score_TB, context).active_TB()
    size = 16 if scope == "sequence" else 48
    for first in range(0, 48, size):
        for block in range(4):
            ordered = sorted(range(first, first + size), key=lambda t: -score_TB[t, block].item())
            expected = sorted(ordered[: round(size * blocks_per_token / 4)])
            assert [t for t in range(first, first + size) if active_TB[t, block]] == expected


def test_later_tokens_push_earlier_ones_out_so_it_is_not_causal():
    score_TB = scores()
    changed_TB = torch.cat([score_TB[:24], 9 + score_TB[24:]])
    rule = ExpertChoice(blocks_per_token=2.0)
    assert not torch.equal(rule(score_TB).active_TB()[:24], rule(changed_TB).active_TB()[:24])
    assert not rule.causal


def test_budget_share_and_refusals():
    rule = ExpertChoice(blocks_per_token=2.0)
    assert rule.with_budget(3) == ExpertChoice(blocks_per_token=3)
    assert rule.share(8) == 0.25
    assert rule(torch.zeros(0, 4)).counts_B.tolist() == [0] * 4
    assert rule(scores(1)).counts_B.tolist() == [1] * 4  # at least one token each
    with pytest.raises(ValueError, match=r"blocks_per_token=0 must be above 0"):
        rule.with_budget(0)
    with pytest.raises(ValueError, match=r"blocks_per_token=5 exceeds partition.num_blocks=4"):
        ExpertChoice(blocks_per_token=5.0).check(4)
