"""Cutting co-activation graphs: exact recovery of planted blocks, the released thresholds by hand, evening out."""

import sys

import pytest
import torch
from torch import Generator, Tensor

from moesaic.sparse.coactivation import even_out, integer_edges, metis_blocks, spectral_blocks


def block_diagonal(num_blocks: int, size: int, *, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """A shuffled graph whose blocks are complete, and the block of each neuron."""
    generator = Generator().manual_seed(num_blocks)
    planted_F = (torch.arange(num_blocks * size) % num_blocks)[torch.randperm(num_blocks * size, generator=generator)]
    weight_FF = (planted_F[:, None] == planted_F[None, :]) * (0.5 + torch.rand(len(planted_F), 1, generator=generator))
    weight_FF = weight_FF + noise * torch.rand(weight_FF.shape, generator=generator)
    return weight_FF + weight_FF.T, planted_F


@pytest.mark.parametrize(("num_blocks", "size"), [(2, 8), (6, 4), (12, 2), (4, 16)])
def test_spectral_recovers_a_block_diagonal_graph_exactly(num_blocks: int, size: int) -> None:
    weight_FF, planted_F = block_diagonal(num_blocks, size)
    found_F = spectral_blocks(weight_FF, num_blocks, generator=Generator().manual_seed(0))
    assert len(set(zip(planted_F.tolist(), found_F.tolist(), strict=True))) == num_blocks


def test_spectral_survives_noise_and_neurons_that_never_fire() -> None:
    weight_FF, planted_F = block_diagonal(4, 8, noise=0.02)
    found_F = spectral_blocks(weight_FF, 4, generator=Generator().manual_seed(0))
    assert len(set(zip(planted_F.tolist(), found_F.tolist(), strict=True))) == 4
    weight_FF[:5], weight_FF[:, :5] = 0.0, 0.0
    assert torch.bincount(spectral_blocks(weight_FF, 4, generator=Generator().manual_seed(0))).tolist() == [8] * 4


def test_spectral_leaves_the_graph_it_was_given_alone() -> None:
    weight_FF, _ = block_diagonal(3, 4)
    kept_FF = weight_FF.clone()
    spectral_blocks(weight_FF, 3, generator=Generator().manual_seed(0))
    assert torch.equal(weight_FF, kept_FF)


def test_released_edges_by_hand() -> None:
    # 16 entries, 8 of them 0: the deciles 10 %..40 % are 0 and the 50 % one is interpolated between 0 and 2: 1.0.
    weight_FF = torch.tensor([[9.0, 2.0, 0.0, 0.0], [2.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 4.5], [0.0, 0.0, 4.5, 9.0]])
    assert integer_edges(weight_FF).tolist() == [[0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 4], [0, 0, 4, 0]]
    assert integer_edges(torch.zeros(3, 3)).count_nonzero() == 0


def test_even_out_moves_only_the_surplus() -> None:
    uneven_F = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 2])
    evened_F = even_out(uneven_F, 3, generator=Generator().manual_seed(0))
    assert torch.bincount(evened_F).tolist() == [3, 3, 3]
    assert (evened_F != uneven_F).sum() == 2
    assert set(evened_F[evened_F != uneven_F].tolist()) == {1}
    assert torch.equal(evened_F, even_out(uneven_F, 3, generator=Generator().manual_seed(0)))


def test_even_out_fills_blocks_that_are_empty() -> None:
    assert torch.bincount(even_out(torch.zeros(8, dtype=torch.int64), 4, generator=Generator())).tolist() == [2] * 4


def test_metis_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(ImportError, match=r"install moesaic\[metis\], or use solver: spectral"):
        metis_blocks(torch.ones(4, 4), 2, generator=Generator())


def test_metis_recovers_a_block_diagonal_graph_and_is_seeded() -> None:
    pytest.importorskip("pymetis", reason="pymetis is an optional extra")
    weight_FF, planted_F = block_diagonal(4, 8)
    found_F = metis_blocks(weight_FF, 4, generator=Generator().manual_seed(0))
    assert len(set(zip(planted_F.tolist(), found_F.tolist(), strict=True))) == 4
    assert torch.equal(found_F, metis_blocks(weight_FF, 4, generator=Generator().manual_seed(0)))
    assert metis_blocks(weight_FF, 1, generator=Generator()).tolist() == [0] * 32
