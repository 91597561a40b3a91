"""Neuron statistics against loops over tokens."""

import pytest
import torch
from toy_ffns import block_outputs, random_experts, random_ffn, random_inputs

from moesaic.sparse.stats import NeuronStats, block_means, hidden_chunks


@pytest.fixture(params=[True, False], ids=["one chunk", "many chunks"])
def _chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr("moesaic.sparse.stats._CHUNK_TOKENS", 16)


@pytest.mark.usefixtures("_chunking")
@pytest.mark.parametrize("gated", [True, False])
def test_means(gated: bool) -> None:
    ffn, x_TD = random_ffn(gated=gated), random_inputs(50)
    h_TF = ffn.hidden(x_TD)
    stats = NeuronStats(ffn, x_TD)
    torch.testing.assert_close(stats.mean_activation(), h_TF.mean(0))
    torch.testing.assert_close(stats.mean_abs(), h_TF.abs().mean(0))
    torch.testing.assert_close(stats.mean_abs_output(), h_TF.abs().mean(0) * ffn.down_FD.norm(dim=1))
    first_FD = ffn.gate_FD if gated else ffn.up_FD
    torch.testing.assert_close(stats.mean_abs_input(), (x_TD @ first_FD.T).abs().mean(0))


@pytest.mark.usefixtures("_chunking")
def test_coactivation_is_a_sum_of_products_symmetric_and_not_negative() -> None:
    ffn, x_TD = random_ffn(), random_inputs(50)
    expected_FF = torch.zeros(24, 24)
    for x_D in x_TD:
        h_F = ffn.hidden(x_D).abs()
        expected_FF += h_F[:, None] * h_F[None, :]
    found_FF = NeuronStats(ffn, x_TD).coactivation()
    torch.testing.assert_close(found_FF, expected_FF)
    torch.testing.assert_close(found_FF, found_FF.T)
    assert (found_FF >= 0).all()


@pytest.mark.usefixtures("_chunking")
def test_clamped_coactivation_counts_groups_of_eight_tokens_up_to_one() -> None:
    ffn, x_TD = random_ffn(), 3 * random_inputs(50)
    expected_FF = torch.zeros(24, 24)
    for start in range(0, 50, 8):
        h_TF = ffn.hidden(x_TD[start : start + 8]).abs()
        expected_FF += (h_TF.T @ h_TF).clamp(max=1.0)
    found_FF = NeuronStats(ffn, x_TD).clamped_coactivation()
    torch.testing.assert_close(found_FF, expected_FF)
    assert found_FF.max() <= 7
    assert not torch.allclose(found_FF, NeuronStats(ffn, x_TD).coactivation())


def test_hidden_chunks_are_float32_and_keep_order_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.sparse.stats._CHUNK_TOKENS", 7)
    experts, x_TD = random_experts(random_ffn(), 4), random_inputs(20)
    chunks = list(hidden_chunks(experts.dense_ffn(), x_TD.bfloat16()))
    assert [len(chunk) for chunk in chunks] == [7, 7, 6]
    assert {chunk.dtype for chunk in chunks} == {torch.float32}
    assert not any(chunk.requires_grad for chunk in chunks)
    torch.testing.assert_close(torch.cat(chunks), experts.dense_ffn().hidden(x_TD.bfloat16().float()).detach())


@pytest.mark.parametrize("gated", [True, False])
def test_block_means_are_mean_block_outputs(gated: bool) -> None:
    experts, x_TD = random_experts(random_ffn(gated=gated), 6), random_inputs(30)
    torch.testing.assert_close(block_means(experts, x_TD), block_outputs(experts, x_TD).mean(0).float())


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="no calibration tokens"):
        NeuronStats(random_ffn(), torch.zeros(0, 8))
