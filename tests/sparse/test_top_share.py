"""Top-k by share: the same choice as top-k with the k that the share comes to."""

from __future__ import annotations

import pytest
import torch
from toy_ffns import random_experts, random_ffn, random_inputs

from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import SparseFFN
from moesaic.sparse.magnitude import GateMagnitude
from moesaic.sparse.select import TopK
from moesaic.sparse.top_share import TopShare


@pytest.mark.parametrize(("active_frac", "k"), [(0.0, 0), (0.25, 6), (0.27, 6), (0.5, 12), (1.0, 24)])
def test_it_chooses_what_top_k_chooses_ties_included(active_frac, k) -> None:
    score_TB = random_inputs(30, dim=24).round(decimals=1)
    found = TopShare(active_frac=active_frac)(score_TB)
    assert torch.equal(found.active_TB(), TopK(k=k)(score_TB).active_TB())


def test_the_whole_share_is_dense() -> None:
    ffn, x_TD = random_ffn(), random_inputs(5)
    score = GateMagnitude().build(8, 24)
    layer = SparseFFN(random_experts(ffn, 24), score, TopShare(active_frac=1.0), Combine().build(8, 24))
    torch.testing.assert_close(layer(x_TD), ffn(x_TD), atol=1e-6, rtol=1e-5)


def test_budgets_and_allocations_set_the_share() -> None:
    rule = TopShare(active_frac=0.5)
    assert rule.with_budget(0.25) == rule.with_share(0.25, 24) == TopShare(active_frac=0.25)
    assert rule.share(24) == 0.5
    with pytest.raises(ValueError, match=r"select\.active_frac=50 is outside 0\.\.1"):
        rule.with_budget(50)
