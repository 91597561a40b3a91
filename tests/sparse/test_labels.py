"""FactorLLM's label maths: everything from the Gram matrix against brute force on block outputs, and spot values."""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor
from toy_ffns import block_outputs, random_experts, random_ffn, random_inputs

from moesaic.sparse.labels import (
    best_subset,
    block_grams,
    fitted_scale,
    pa_distances,
    relative_error,
    singleton_gains,
    smallest_blocks,
    subset_error,
)

SCALES = (1.0, math.sqrt(2.0), 2.0, 4 / 3)


def grams(num_blocks: int, num_tokens: int = 12, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Gram matrices of random experts, and the block outputs (T, B, D) in float64 that they stand for."""
    experts, x_TD = random_experts(random_ffn(width=48), num_blocks), random_inputs(num_tokens, seed=seed)
    return block_grams(experts, x_TD), block_outputs(experts, x_TD)


def brute_error(out_BD: Tensor, chosen: list[int], scale: float) -> float:
    return (out_BD.sum(0) - scale * out_BD[chosen].sum(0)).square().sum().item()


def orthogonal_gram(norms: list[float]) -> Tensor:
    return torch.diag(torch.tensor(norms) ** 2)[None]


def mask(num_blocks: int, chosen: list[int]) -> Tensor:
    active_TB = torch.zeros(1, num_blocks, dtype=torch.bool)
    active_TB[0, chosen] = True
    return active_TB


@pytest.mark.parametrize("elements", [2**25, 64])
@pytest.mark.parametrize("gated", [True, False])
def test_grams(gated: bool, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.sparse.labels._OUTPUT_ELEMENTS", elements)
    experts, x_TD = random_experts(random_ffn(gated=gated, bias=True), 4), random_inputs(9)
    out_TBD = block_outputs(experts, x_TD)
    gram_TBB = block_grams(experts, x_TD)
    torch.testing.assert_close(gram_TBB, torch.einsum("tbd,tjd->tbj", out_TBD, out_TBD).float(), rtol=1e-4, atol=1e-6)
    assert not gram_TBB.requires_grad
    assert block_grams(experts, x_TD[:0]).shape == (0, 4, 4)


def test_the_sum_of_a_gram_matrix_is_the_squared_dense_output() -> None:
    ffn = random_ffn()
    x_TD = random_inputs(9)
    gram_TBB = block_grams(random_experts(ffn, 4), x_TD)
    torch.testing.assert_close(gram_TBB.sum((1, 2)), ffn(x_TD).square().sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("teacher_scale", [0.25, 0.5, 1.0])
def test_distances_and_errors_equal_brute_force(teacher_scale: float) -> None:
    gram_TBB, out_TBD = grams(4)
    distance_TB = pa_distances(gram_TBB, teacher_scale, 8)
    for t, out_BD in enumerate(out_TBD):
        for b in range(4):
            expected = (out_BD[b] - teacher_scale * out_BD.sum(0)).square().mean().item()
            assert distance_TB[t, b].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for k in range(5):
        for chosen in combinations(range(4), k):
            for scale in SCALES:
                found_T = subset_error(gram_TBB, mask(4, list(chosen)).expand(12, 4), scale)
                expected_T = [brute_error(out_BD, list(chosen), scale) for out_BD in out_TBD]
                torch.testing.assert_close(found_T, torch.tensor(expected_T).float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("teacher_scale", "expected"), [(0.25, [0, 1]), (1.0, [2, 3])], ids=["c 1/4: smallest", "c 1: largest"]
)
def test_orthogonal_blocks(teacher_scale: float, expected: list[int]) -> None:
    norms = [1.0, 2.0, 3.0, 4.0]
    gram_TBB = orthogonal_gram(norms)
    distance_TB = pa_distances(gram_TBB, teacher_scale, 8)
    assert smallest_blocks(distance_TB, 2)[0].nonzero()[:, 0].tolist() == expected
    constant = teacher_scale**2 * sum(a * a for a in norms)
    by_hand = torch.tensor([[(1 - 2 * teacher_scale) * a * a + constant for a in norms]]) / 8
    torch.testing.assert_close(distance_TB, by_hand)


def test_orthogonal_blocks_at_c_one_half_are_all_alike_and_c_one_is_the_subset_oracle() -> None:
    gram_TBB = orthogonal_gram([1.0, 2.0, 3.0, 4.0])
    half_TB = pa_distances(gram_TBB, 0.5, 8)
    assert (half_TB == half_TB[0, 0]).all()
    assert smallest_blocks(half_TB, 2).tolist() == [[True, True, False, False]]
    for k in range(5):
        assert torch.equal(smallest_blocks(pa_distances(gram_TBB, 1.0, 8), k), best_subset(gram_TBB, k))


@pytest.mark.parametrize(
    ("k", "scale", "expected"),
    [(2, 1.0, 0.5), (2, math.sqrt(2), 0.5858), (2, 2.0, 1.0), (1, 1.0, 0.75), (1, 2.0, 1.0), (1, 4.0, 3.0)],
)
def test_relative_error_of_orthogonal_equal_blocks(k: int, scale: float, expected: float) -> None:
    found = relative_error(orthogonal_gram([3.0] * 4), mask(4, list(range(k))), scale)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found == pytest.approx((k * (scale - 1) ** 2 + 4 - k) / 4, abs=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.22, 0.7, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_fitted_scale_of_equal_pairwise_cosines(k: int, rho: float) -> None:
    gram_TBB = ((1 - rho) * torch.eye(4) + rho)[None]
    found = fitted_scale(gram_TBB, mask(4, list(range(k))))
    assert found == pytest.approx((1 + 3 * rho) / (1 + (k - 1) * rho), abs=1e-5)
    if rho == 0:
        assert found == pytest.approx(1.0)
    if rho == 1:
        assert found == pytest.approx(4 / k)
    if (k, rho) == (2, 0.22):
        assert found == pytest.approx(1.361, abs=5e-4)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_fitted_scale_is_the_best_scale(k: int) -> None:
    gram_TBB, out_TBD = grams(4)
    active_TB = smallest_blocks(torch.rand(12, 4, generator=torch.Generator().manual_seed(0)), k)
    chosen_TD = (out_TBD * active_TB[:, :, None]).sum(1)
    expected = (out_TBD.sum(1) * chosen_TD).sum() / chosen_TD.square().sum()
    best = fitted_scale(gram_TBB, active_TB)
    assert best == pytest.approx(expected.item(), rel=1e-3)
    for scale in (1.0, math.sqrt(4 / k), 4 / k, float(4 // k), best + 0.05, best - 0.05):
        assert relative_error(gram_TBB, active_TB, best) <= relative_error(gram_TBB, active_TB, scale) + 1e-6
    if k == 4:
        assert best == pytest.approx(1.0, rel=1e-5)


def test_fitted_scale_without_any_block() -> None:
    gram_TBB, _ = grams(4)
    assert fitted_scale(gram_TBB, torch.zeros(12, 4, dtype=torch.bool)) == 1.0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("k", range(5))
def test_best_subset_is_the_least_error_of_all_subsets(k: int, scale: float) -> None:
    gram_TBB, out_TBD = grams(4)
    active_TB = best_subset(gram_TBB, k, scale)
    assert (active_TB.sum(1) == k).all()
    for t, out_BD in enumerate(out_TBD):
        least = min(brute_error(out_BD, list(chosen), scale) for chosen in combinations(range(4), k))
        found = brute_error(out_BD, active_TB[t].nonzero()[:, 0].tolist(), scale)
        assert found == pytest.approx(least, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("num_blocks", [4, 16])
def test_no_other_label_beats_the_subset_oracle_where_it_is_exact(num_blocks: int) -> None:
    gram_TBB, _ = grams(num_blocks, 60)
    norm_TB = gram_TBB.diagonal(dim1=1, dim2=2)
    random_TB = torch.rand(norm_TB.shape, generator=torch.Generator().manual_seed(0))
    k = 2
    for scale in SCALES:
        best_T = subset_error(gram_TBB, best_subset(gram_TBB, k, scale), scale)
        for distance_TB in (pa_distances(gram_TBB, 0.5, 8), pa_distances(gram_TBB, 1.0, 8), -norm_TB, random_TB):
            assert (best_T <= subset_error(gram_TBB, smallest_blocks(distance_TB, k), scale) + 1e-5).all()


def test_the_least_error_with_at_most_k_blocks_never_grows_with_k_though_with_exactly_k_it_may() -> None:
    # Two blocks that cancel: with exactly one of three blocks the output is further off than with none.
    out_BD = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 0.1]])
    gram_TBB = (out_BD @ out_BD.T)[None]
    exact = [subset_error(gram_TBB, best_subset(gram_TBB, k)).item() for k in range(4)]
    assert exact[2] > exact[1]
    gram_TBB, _ = grams(6, 40)
    at_most_T = torch.full((40,), math.inf)
    for k in range(7):
        within_T = torch.minimum(at_most_T, subset_error(gram_TBB, best_subset(gram_TBB, k)))
        assert (within_T <= at_most_T).all()
        at_most_T = within_T
    torch.testing.assert_close(at_most_T, torch.zeros(40), atol=1e-4, rtol=0)


def test_many_candidates_are_searched_one_block_at_a_time() -> None:
    gram_TBB, out_TBD = grams(12, 6)
    assert math.comb(12, 4) > 128
    active_TB = best_subset(gram_TBB, 4)
    for t, out_BD in enumerate(out_TBD):
        chosen: list[int] = []
        for _ in range(4):
            rest = [b for b in range(12) if b not in chosen]
            chosen.append(min(rest, key=lambda b: brute_error(out_BD, [*chosen, b], 1.0)))
        assert active_TB[t].nonzero()[:, 0].tolist() == sorted(chosen)


def test_greedy_equals_enumeration_on_orthogonal_blocks() -> None:
    norms = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    active_TB = best_subset(orthogonal_gram(norms), 5)
    assert set(active_TB[0].nonzero()[:, 0].tolist()) == set(sorted(range(20), key=lambda b: -norms[b])[:5])


def test_ties_go_to_the_lowest_blocks() -> None:
    gram_TBB = orthogonal_gram([2.0] * 4)
    assert best_subset(gram_TBB, 2).tolist() == [[True, True, False, False]]
    assert best_subset(orthogonal_gram([2.0] * 20), 4)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]


def test_singleton_gains_are_what_one_block_takes_off_the_error() -> None:
    gram_TBB, out_TBD = grams(4)
    gain_TB = singleton_gains(gram_TBB, 2.0)
    for t, out_BD in enumerate(out_TBD):
        for b in range(4):
            expected = brute_error(out_BD, [], 2.0) - brute_error(out_BD, [b], 2.0)
            assert gain_TB[t, b].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_small_distances_keep_their_order_in_float32_where_a_bfloat16_softmax_loses_it() -> None:
    distance_TB = torch.tensor([[0.003, 0.004, 0.005, 0.007]])
    for k in range(1, 5):
        assert smallest_blocks(distance_TB, k)[0].nonzero()[:, 0].tolist() == list(range(k))
    assert (-distance_TB).bfloat16().softmax(1).unique().numel() < 4


def test_labels_of_a_bfloat16_model_are_float32_also_under_autocast() -> None:
    experts, x_TD = random_experts(random_ffn(), 4).bfloat16(), random_inputs(9).bfloat16()
    expected_TBB = torch.einsum("tbd,tjd->tbj", *[block_outputs(experts, x_TD)] * 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gram_TBB = block_grams(experts, x_TD)
    assert gram_TBB.dtype == torch.float32
    torch.testing.assert_close(gram_TBB, expected_TBB, rtol=1e-4, atol=1e-6)
