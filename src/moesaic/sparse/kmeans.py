"""Balanced k-means: clusters of exactly equal size, by the published solver or by a fast one for large layers.

Source: arXiv:2110.01786 sec. 3.2 (balanced k-means on neurons); github.com/thunlp/MoEfication, folder
`faster_moefication` (balanced assignment in turn with new centroids, best round kept); the assignment is the auction
of Bertsekas and Castanon 1989 (transportation problems), all bids of a step at once. Differs: seeded throughout.
Shapes: F points (neurons), D dimensions, B blocks (clusters), S = F / B points per block, U points without a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor

__all__ = [
    "BalancedClusters",
    "balanced_assignment",
    "balanced_kmeans",
    "constrained_kmeans",
    "inertia",
    "kmeans",
    "unit_rows",
]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_LLOYD_ROUNDS = 10
_PATIENCE = 5  # rounds without a new best inertia after which balanced_kmeans stops
# Bid increments as shares of the spread of the costs: coarse bids find the prices, fine ones the assignment.
_AUCTION_INCREMENTS = (1.0, 0.3, 0.1, 0.03)
_AUCTION_STEPS = 5000  # bidding rounds per increment; what is still without a block then takes the free places


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BalancedClusters:
    """Equal clusters: `block_F` (int64), their `inertia`, and the inertia of every round that was tried."""

    block_F: Tensor
    inertia: float
    inertia_per_round: tuple[float, ...]


def unit_rows(weight_FD: Tensor) -> Tensor:
    """The rows of a matrix scaled to length 1, in float32; zero rows stay zero."""
    return nnf.normalize(weight_FD.detach().float(), dim=1)


def inertia(point_FD: Tensor, block_F: Tensor, num_blocks: int) -> float:
    """Sum of squared distances of the points to the mean of their block; every block holds F / num_blocks points."""
    mean_BD = _means(point_FD, block_F, num_blocks)
    size = len(point_FD) // num_blocks
    return (_sum_of_squares(point_FD) - size * _sum_of_squares(mean_BD)).item()


@torch.no_grad()
def kmeans(point_FD: Tensor, num_clusters: int, *, generator: Generator) -> Tensor:
    """int64 (F,): clusters of any size, 0 included, by k-means++ and Lloyd's rounds."""
    point_FD = point_FD.float()
    return _cost(point_FD, _lloyd(point_FD, _spread_centroids(point_FD, num_clusters, generator))).argmin(dim=1)


@torch.no_grad()
def constrained_kmeans(point_FD: Tensor, num_blocks: int, *, generator: Generator) -> BalancedClusters:
    """Equal clusters by min-cost flow, the published solver: 10 starts, the best kept. Slow from some thousand points.

    Source: Bradley, Bennett and Demiriz 2000, as in the package k-means-constrained with min = max = S.
    """
    from k_means_constrained import KMeansConstrained

    size = len(point_FD) // num_blocks
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    solver = KMeansConstrained(n_clusters=num_blocks, size_min=size, size_max=size, random_state=seed)
    block_F = torch.from_numpy(solver.fit(point_FD.float().cpu().numpy()).labels_).long()
    found = inertia(point_FD.float().cpu(), block_F, num_blocks)
    return BalancedClusters(block_F=block_F, inertia=found, inertia_per_round=(found,))


@torch.no_grad()
def balanced_kmeans(
    point_FD: Tensor, num_blocks: int, *, generator: Generator, max_rounds: int = 100
) -> BalancedClusters:
    """Equal clusters by rounds of {balanced assignment; new centroids}, from plain k-means; the best round is kept.

    `point_FD` is float32 and `num_blocks` divides F. Ends early once the
    clusters stay as they are or the inertia has stopped falling.
    """
    centroid_BD = _lloyd(point_FD, _spread_centroids(point_FD, num_blocks, generator))
    block_F, best_F, rounds = torch.empty(0), torch.empty(0), []
    for _ in range(max_rounds):
        previous_F, block_F = block_F, balanced_assignment(_cost(point_FD, centroid_BD)).to(point_FD.device)
        if torch.equal(block_F, previous_F):
            break
        centroid_BD = _means(point_FD, block_F, num_blocks)
        rounds.append(inertia(point_FD, block_F, num_blocks))
        if rounds[-1] == min(rounds):
            best_F = block_F
        if min(rounds) < min(rounds[-_PATIENCE:]):
            break
    return BalancedClusters(block_F=best_F.cpu(), inertia=min(rounds), inertia_per_round=tuple(rounds))


def balanced_assignment(cost_FB: Tensor) -> Tensor:
    """int64 (F,) on the CPU: a block for each point, every block F / B times, at nearly the least total cost.

    Within F * 0.03 * (spread of the costs between blocks) of the optimum, in practice far closer. Points bid for
    blocks; a full block drops its lowest bidder and asks for the lowest bid that it holds.
    """
    num_points, num_blocks = cost_FB.shape
    if num_blocks == 1:
        return torch.zeros(num_points, dtype=torch.int64)
    # Increments below the rounding of the costs would never raise a price.
    spread = max(cost_FB.std(dim=1).mean().item(), 1e-6 * cost_FB.abs().max().item(), 1e-30)
    # NumPy from here on: thousands of tiny steps, which PyTorch's threads only slow down.
    cost = cost_FB.float().cpu().numpy()
    price_B = np.zeros(num_blocks, dtype=np.float32)
    for share in _AUCTION_INCREMENTS:
        block_F = _auction(cost, price_B, share * spread)
    return torch.from_numpy(_fill_up(cost, block_F))


def _auction(cost_FB: FloatArray, price_B: FloatArray, increment: float) -> IntArray:
    """Blocks of the points, -1 where the steps ran out; `price_B` is raised in place."""
    num_points, num_blocks = cost_FB.shape
    block_F = np.full(num_points, -1, dtype=np.int64)
    bid_F = np.zeros(num_points, dtype=np.float32)
    for _ in range(_AUCTION_STEPS):
        free_U = np.flatnonzero(block_F < 0)
        if not len(free_U):
            break
        value_UB = -cost_FB[free_U] - price_B
        wanted_U = value_UB.argmax(axis=1)
        row_U = np.arange(len(free_U))
        best_U = value_UB[row_U, wanted_U]
        value_UB[row_U, wanted_U] = -np.inf
        block_F[free_U] = wanted_U
        bid_F[free_U] = price_B[wanted_U] + best_U - value_UB.max(axis=1) + increment
        _settle(block_F, bid_F, price_B, wanted_U, num_points // num_blocks)
    return block_F


def _settle(block_F: IntArray, bid_F: FloatArray, price_B: FloatArray, wanted_U: IntArray, size: int) -> None:
    """Send the lowest bidders of each over-full block away and set the price of full ones, all in place."""
    contested_B = np.zeros(len(price_B), dtype=bool)
    contested_B[wanted_U] = True
    holder = np.flatnonzero(contested_B[block_F] & (block_F >= 0))
    holder = holder[np.lexsort((-bid_F[holder], block_F[holder]))]
    of_holder = block_F[holder]
    counts_B = np.bincount(of_holder, minlength=len(price_B))
    rank = np.arange(len(holder)) - (counts_B.cumsum() - counts_B)[of_holder]
    marginal = holder[rank == size - 1]
    price_B[block_F[marginal]] = bid_F[marginal]
    block_F[holder[rank >= size]] = -1


def _fill_up(cost_FB: FloatArray, block_F: IntArray) -> IntArray:
    """Put each point that has no block into the cheapest block with a free place."""
    num_points, num_blocks = cost_FB.shape
    room_B = num_points // num_blocks - np.bincount(block_F[block_F >= 0], minlength=num_blocks)
    for point in np.flatnonzero(block_F < 0):
        block = np.where(room_B > 0, cost_FB[point], np.inf).argmin()
        block_F[point] = block
        room_B[block] -= 1
    return block_F


def _spread_centroids(point_FD: Tensor, num_blocks: int, generator: Generator) -> Tensor:
    """k-means++ with several candidates per centroid, of which the best is kept (as in scikit-learn)."""
    num_points, trials = len(point_FD), 2 + int(math.log(num_blocks))
    chosen = [int(torch.randint(num_points, (), generator=generator))]
    square_F1 = torch.linalg.vector_norm(point_FD, dim=1, keepdim=True).square()
    nearest_F = (_cost(point_FD, point_FD[chosen]) + square_F1)[:, 0]
    while len(chosen) < num_blocks:
        # Draws happen on the CPU so that a seed means the same on every device; the floor serves all-equal points.
        weight_F = nearest_F.double().clamp(min=1e-12).cpu()
        candidates = torch.multinomial(weight_F, trials, replacement=True, generator=generator)
        candidate_FC = (_cost(point_FD, point_FD[candidates]) + square_F1).minimum(nearest_F[:, None])
        winner = int(candidate_FC.sum(0, dtype=torch.float64).argmin())
        nearest_F = candidate_FC[:, winner]
        chosen.append(int(candidates[winner]))
    return point_FD[chosen]


def _lloyd(point_FD: Tensor, centroid_BD: Tensor) -> Tensor:
    for _ in range(_LLOYD_ROUNDS):
        block_F = _cost(point_FD, centroid_BD).argmin(dim=1)
        counts_B = torch.bincount(block_F, minlength=len(centroid_BD))
        sum_BD = torch.zeros_like(centroid_BD).index_add_(0, block_F, point_FD)
        mean_BD = sum_BD / counts_B.clamp(min=1)[:, None]
        centroid_BD = torch.where(counts_B[:, None] > 0, mean_BD, centroid_BD)
    return centroid_BD


def _means(point_FD: Tensor, block_F: Tensor, num_blocks: int) -> Tensor:
    sum_BD = point_FD.new_zeros(num_blocks, point_FD.shape[1]).index_add_(0, block_F, point_FD)
    return sum_BD * (num_blocks / len(point_FD))


def _cost(point_FD: Tensor, centroid_BD: Tensor) -> Tensor:
    """Squared distances less the squared length of each point, which is the same for all blocks."""
    return torch.addmm(centroid_BD.square().sum(1), point_FD, centroid_BD.mT, alpha=-2.0)


def _sum_of_squares(rows_FD: Tensor) -> Tensor:
    # Row by row first: one float32 sum over tens of millions of terms would lose digits.
    return torch.linalg.vector_norm(rows_FD, dim=1).double().square().sum()
