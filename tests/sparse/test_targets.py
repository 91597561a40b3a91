"""Block targets against nested loops, captured mass and its limits, normalisation by quantile."""

import math

import pytest
import torch
from torch import Tensor
from toy_ffns import block_outputs, random_experts, random_ffn, random_inputs

from moesaic.sparse.experts import Experts
from moesaic.sparse.select import TopK
from moesaic.sparse.targets import (
    block_targets,
    captured_mass,
    expert_targets,
    normalise_targets,
    output_norms,
    quantile_scale,
)

TARGETS = ("positive", "abs_sum", "l1", "l2", "l2sq", "output_norm")


def looped_targets(experts: Experts, x_TD: Tensor, target: str) -> Tensor:
    h_TF, size = experts.dense_ffn().hidden(x_TD).detach().double(), experts.block_size
    out_TBD = block_outputs(experts, x_TD)
    found_TB = torch.zeros(len(x_TD), experts.num_blocks)
    for t in range(len(x_TD)):
        for b in range(experts.num_blocks):
            values = h_TF[t, b * size : (b + 1) * size].tolist()
            found_TB[t, b] = {
                "positive": sum(v for v in values if v > 0),
                "abs_sum": abs(sum(values)),
                "l1": sum(abs(v) for v in values),
                "l2": math.sqrt(sum(v * v for v in values)),
                "l2sq": sum(v * v for v in values),
                "output_norm": math.sqrt(sum(v * v for v in out_TBD[t, b].tolist())),
            }[target]
    return found_TB


@pytest.mark.parametrize("chunk", [4096, 7])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_targets(target: str, gated: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.sparse.stats._CHUNK_TOKENS", chunk)
    experts, x_TD = random_experts(random_ffn(gated=gated, bias=True), 6), random_inputs(20)
    found_TB = expert_targets(experts, x_TD, target)
    torch.testing.assert_close(found_TB, looped_targets(experts, x_TD, target), rtol=1e-4, atol=1e-6)
    assert found_TB.dtype == torch.float32
    assert not found_TB.requires_grad


@pytest.mark.parametrize("size", [2, 8, 16])
@pytest.mark.parametrize("num_tokens", [1, 3, 200])
def test_output_norms_through_gram_matrices_and_directly(size: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(size)
    h_TBS = torch.randn(num_tokens, 3, size, generator=generator)
    down_BSD = torch.randn(3, size, 8, generator=generator)
    expected_TB = torch.einsum("tbs,bsd->tbd", h_TBS.double(), down_BSD.double()).norm(dim=2).float()
    torch.testing.assert_close(output_norms(h_TBS, down_BSD), expected_TB, rtol=1e-4, atol=1e-5)


def test_after_relu_positive_l1_and_abs_sum_are_one_thing_and_on_swiglu_they_are_not() -> None:
    x_TD = random_inputs(20)
    plain, gated = random_experts(random_ffn(gated=False), 6), random_experts(random_ffn(), 6)
    of_plain = [expert_targets(plain, x_TD, target) for target in ("positive", "l1", "abs_sum")]
    torch.testing.assert_close(of_plain[0], of_plain[1])
    torch.testing.assert_close(of_plain[0], of_plain[2])
    of_gated = [expert_targets(gated, x_TD, target) for target in ("positive", "l1", "abs_sum")]
    assert not torch.allclose(of_gated[0], of_gated[1])
    assert not torch.allclose(of_gated[1], of_gated[2])


def test_no_tokens_and_autocast() -> None:
    experts, x_TD = random_experts(random_ffn(), 6), random_inputs(9)
    assert expert_targets(experts, x_TD[:0], "l1").shape == (0, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast_TB = expert_targets(experts, x_TD, "output_norm")
    assert torch.equal(under_autocast_TB, expert_targets(experts, x_TD, "output_norm"))


def test_half_precision_activations_are_summed_in_float32() -> None:
    h_TBS = torch.full((1, 1, 1000), 0.1, dtype=torch.bfloat16)
    down_BSD = torch.empty(1, 1000, 1)
    expected = 1000 * h_TBS[0, 0, 0].item()
    assert block_targets(h_TBS, "l1", down_BSD).item() == pytest.approx(expected, rel=1e-5)


def test_captured_mass_never_falls_with_k_ends_at_one_and_no_choice_beats_the_oracle() -> None:
    target_TB = expert_targets(random_experts(random_ffn(), 12), random_inputs(50), "l1")
    other_TB = torch.rand(target_TB.shape, generator=torch.Generator().manual_seed(0))
    previous = 0.0
    for k in range(13):
        oracle = captured_mass(target_TB, TopK(k=k)(target_TB).active_TB())
        other = captured_mass(target_TB, TopK(k=k)(other_TB).active_TB())
        assert oracle >= previous - 1e-6
        assert other <= oracle + 1e-6
        previous = oracle
    assert previous == pytest.approx(1.0)


def test_captured_mass_by_hand_leaves_out_tokens_without_mass() -> None:
    target_TB = torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]])
    active_TB = torch.tensor([[False, True], [True, False], [True, False]])
    assert captured_mass(target_TB, active_TB) == pytest.approx((0.75 + 0.5) / 2)
    assert captured_mass(torch.zeros(3, 2), active_TB) == 1.0


@pytest.mark.parametrize("quantile", [0.001, 0.25, 0.5, 0.999, 1.0])
def test_quantile_scale_is_the_smallest_entry_that_enough_entries_do_not_exceed(quantile: float) -> None:
    target_TB = torch.rand(40, 5, generator=torch.Generator().manual_seed(3))
    scale = quantile_scale(target_TB, quantile)
    assert (target_TB <= scale).float().mean() >= quantile
    assert (target_TB < scale).float().mean() < quantile
    assert quantile_scale(target_TB, 1.0) == target_TB.max()


@pytest.mark.parametrize("quantile", [0.0, 1.5])
def test_a_quantile_outside_its_range_is_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        quantile_scale(torch.ones(2, 2), quantile)


def test_normalised_targets_are_clipped_and_one_outlier_does_not_flatten_them() -> None:
    target_TB = torch.ones(100, 20)
    target_TB[0, 0] = 1e6
    assert normalise_targets(target_TB, quantile_scale(target_TB)).min() == 1.0
    assert normalise_targets(target_TB, target_TB.max().item()).median() == pytest.approx(1e-6)
    assert normalise_targets(torch.zeros(2, 2), 0.0).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert normalise_targets(torch.tensor([[0.5, 3.0]]), 2.0).tolist() == [[0.25, 1.0]]
