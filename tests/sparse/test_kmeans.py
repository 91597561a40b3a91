"""Balanced k-means: the assignment against the Hungarian method, the clustering against planted structure."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from moesaic.sparse.kmeans import balanced_assignment, balanced_kmeans, constrained_kmeans, inertia, unit_rows


def points(num_points: int, dim: int, seed: int = 0) -> Tensor:
    return unit_rows(torch.randn(num_points, dim, generator=Generator().manual_seed(seed)))


def brute_inertia(point_FD: Tensor, block_F: Tensor) -> float:
    total = 0.0
    for block in block_F.unique():
        members = point_FD[block_F == block].double()
        total += (members - members.mean(0)).square().sum().item()
    return total


def test_unit_rows() -> None:
    rows = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_inertia_is_the_sum_of_squared_distances_to_the_block_means() -> None:
    point_FD, block_F = points(30, 7), torch.arange(30) % 5
    assert inertia(point_FD, block_F, 5) == pytest.approx(brute_inertia(point_FD, block_F), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_points", "num_blocks"), [(24, 6), (60, 3), (40, 40), (12, 1)])
def test_assignment_is_balanced_and_nearly_optimal(num_points: int, num_blocks: int, seed: int) -> None:
    cost_FB = torch.rand(num_points, num_blocks, generator=Generator().manual_seed(seed))
    block_F = balanced_assignment(cost_FB)
    size = num_points // num_blocks
    assert torch.bincount(block_F, minlength=num_blocks).tolist() == [size] * num_blocks
    found = cost_FB[torch.arange(num_points), block_F].sum().item()
    slots = cost_FB.repeat_interleave(size, dim=1).numpy()
    optimum = slots[linear_sum_assignment(slots)].sum().item()
    spread = cost_FB.std(dim=1).mean().item() if num_blocks > 1 else 0.0
    assert optimum - 1e-4 <= found <= optimum + 0.03 * spread * num_points + 1e-4


@pytest.mark.parametrize(
    "cost_FB",
    [torch.zeros(12, 4), torch.full((12, 4), 1e6), torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(12, 1)],
    ids=["all zero", "all equal and large", "all want block 0"],
)
def test_assignment_of_points_that_are_alike_stays_balanced(cost_FB: Tensor) -> None:
    assert torch.bincount(balanced_assignment(cost_FB), minlength=4).tolist() == [3] * 4


def test_points_left_over_when_the_bidding_stops_still_get_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.sparse.kmeans._AUCTION_STEPS", 1)
    cost_FB = torch.tensor([[0.0, 1.0, 2.0]]).repeat(9, 1)
    assert torch.bincount(balanced_assignment(cost_FB), minlength=3).tolist() == [3] * 3


@pytest.mark.parametrize("solve", [balanced_kmeans, constrained_kmeans])
def test_planted_blocks_are_recovered_up_to_renaming(solve: object) -> None:
    planted_F = torch.arange(48) % 6
    centre_BD = torch.randn(6, 10, generator=Generator().manual_seed(2))
    noise_FD = 0.05 * torch.randn(48, 10, generator=Generator().manual_seed(3))
    found = solve(unit_rows(centre_BD[planted_F] + noise_FD), 6, generator=Generator().manual_seed(0))
    assert len(set(zip(planted_F.tolist(), found.block_F.tolist(), strict=True))) == 6


@pytest.mark.parametrize("seed", range(3))
def test_the_kept_round_is_the_best_one_and_its_inertia_is_that_of_its_labels(seed: int) -> None:
    point_FD = points(96, 12, seed)
    found = balanced_kmeans(point_FD, 4, generator=Generator().manual_seed(seed))
    assert len(found.inertia_per_round) > 1
    assert found.inertia == min(found.inertia_per_round)
    assert found.inertia == pytest.approx(brute_inertia(point_FD, found.block_F), rel=1e-5)


@pytest.mark.parametrize("solve", [balanced_kmeans, constrained_kmeans])
def test_one_seed_gives_one_clustering(solve: object) -> None:
    point_FD = points(64, 12)
    first, second = (solve(point_FD, 8, generator=Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first.block_F, second.block_F)
    assert first.inertia == second.inertia


def test_fast_is_about_as_good_as_exact() -> None:
    point_FD = points(256, 32)
    fast = balanced_kmeans(point_FD, 32, generator=Generator().manual_seed(0))
    exact = constrained_kmeans(point_FD, 32, generator=Generator().manual_seed(0))
    assert fast.inertia <= 1.02 * exact.inertia
    assert fast.inertia < 0.9 * inertia(point_FD, torch.arange(256) // 8, 32)


def test_duplicate_points_and_as_many_blocks_as_points() -> None:
    found = balanced_kmeans(torch.ones(12, 3), 4, generator=Generator().manual_seed(0))
    assert torch.bincount(found.block_F).tolist() == [3] * 4
    alone = balanced_kmeans(points(8, 3), 8, generator=Generator().manual_seed(0))
    assert alone.block_F.sort().values.tolist() == list(range(8))
    assert alone.inertia == pytest.approx(0.0, abs=1e-5)
