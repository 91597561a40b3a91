"""CH index and token correlation against loops and by hand."""

import pytest
import torch

from moesaic.sparse.separation import ch_index, token_correlation


def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 5, generator=generator), torch.randint(0, 3, (30,), generator=generator)


def test_ch_index_by_hand():
    x_TD = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    assert ch_index(x_TD, torch.tensor([0, 0, 1, 1]), 3) == pytest.approx(100 / 4)
    assert ch_index(x_TD, torch.tensor([0, 1, 0, 1]), 2) == pytest.approx(4 / 100)


def test_correlation_against_all_pairs():
    x_TD, block_T = tokens()
    cosine_TT = torch.nn.functional.cosine_similarity(x_TD[:, None], x_TD[None], dim=2)
    pairs_TT = (block_T[:, None] == block_T) & ~torch.eye(30, dtype=torch.bool)
    assert token_correlation(x_TD, block_T, 4) == pytest.approx(cosine_TT[pairs_TT].mean().item(), abs=1e-6)


def test_blocks_of_one_token_have_no_pairs():
    assert token_correlation(torch.randn(3, 4), torch.arange(3), 3) == 0
