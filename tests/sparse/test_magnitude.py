"""Thresholds on the gate: exact quantiles, strict comparison, dense where it must be, and what they cost."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from toy_ffns import random_experts, random_ffn, random_inputs
from toys import tiny_model
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from moesaic.bench.anatomy import Matrix, read_anatomy
from moesaic.bench.ceilings import Ceilings
from moesaic.bench.cost import Call, Load, call_work, cost_record, full_loads, ideal_seconds
from moesaic.ffn.dense import DenseFFN
from moesaic.ffn.sites import find_ffns
from moesaic.sparse.combine import Combine
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.magnitude import GateMagnitude, Quantile, QuantileTable, binned_quantiles, exact_quantiles
from moesaic.sparse.model import convert_model, load_model
from moesaic.sparse.select import RoutingContext

DIM, WIDTH = 8, 24


def layer_of(
    ffn: DenseFFN | None = None, *, p: float = 0.5, dense_share: float = 0.0, executor: str = "masked"
) -> SparseFFN:
    """An FFN with a block per neuron, thresholds found on other tokens than the tests use."""
    ffn = ffn or random_ffn()
    experts = Experts.from_dense(ffn, torch.arange(ffn.width))
    score = GateMagnitude().build(ffn.dim, ffn.width)
    select = Quantile(p=p, prefill_dense_share=dense_share)
    layer = SparseFFN(experts, score, select, Combine().build(ffn.dim, ffn.width), executor=executor)
    assert isinstance(layer.select_state, QuantileTable)
    with torch.no_grad():
        score_TB = layer.score(random_inputs(4000, dim=ffn.dim, seed=5), experts)
    layer.select_state.quantile_Q.copy_(exact_quantiles(score_TB.flatten()))
    return layer.eval()


@pytest.mark.parametrize(
    ("ffn", "weight", "bias"),
    [
        (random_ffn(), "gate_FD", None),
        (random_ffn(bias=True), "gate_FD", "gate_bias_F"),
        (random_ffn(gated=False, bias=True, activation="gelu"), "up_FD", "up_bias_F"),
    ],
)
@pytest.mark.parametrize("num_blocks", [WIDTH, 6])
def test_the_score_is_the_largest_first_product_of_the_block(ffn, weight, bias, num_blocks) -> None:
    experts, x_TD = random_experts(ffn, num_blocks), random_inputs(5)
    score_TB = GateMagnitude().build(DIM, num_blocks)(x_TD, experts)
    for t in range(5):
        for b in range(num_blocks):
            found = 0.0
            for neuron in experts.neuron_F.unflatten(0, (num_blocks, -1))[b].tolist():
                value = getattr(ffn, weight)[neuron] @ x_TD[t] + (getattr(ffn, bias)[neuron] if bias else 0.0)
                found = max(found, abs(ACT2FN[ffn.activation](value).item()))
            assert score_TB[t, b].item() == pytest.approx(found, abs=1e-6)


def test_the_score_sees_the_values_that_a_half_precision_ffn_multiplies_with() -> None:
    ffn = random_ffn()
    half = replace(ffn, **{name: getattr(ffn, name).bfloat16() for name in ("gate_FD", "up_FD", "down_FD")})
    experts, x_TD = Experts.from_dense(half, torch.arange(WIDTH)), random_inputs(5).bfloat16()
    score_TB = GateMagnitude().build(DIM, WIDTH)(x_TD, experts)
    assert score_TB.dtype == torch.float32
    assert torch.equal(score_TB, ACT2FN["silu"](x_TD @ half.gate_FD.mT).abs().float())


def test_quantiles_of_a_normal_distribution() -> None:
    table = QuantileTable()
    draws_N = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).abs()
    table.quantile_Q.copy_(exact_quantiles(draws_N))
    for p, expected in {0.25: 0.319, 0.4: 0.524, 0.5: 0.674}.items():
        assert table.threshold(p).item() == pytest.approx(expected, abs=3e-3)
    assert table.threshold(1.0) == draws_N.max()
    assert table.threshold(0.4004) == pytest.approx(torch.lerp(*table.quantile_Q[400:402], 0.4).item())


def test_exact_quantiles_by_hand() -> None:
    quantile_Q = exact_quantiles(torch.tensor([3.0, 1.0, 2.0, 2.0]))
    # A quarter of the scores is at most 1, three quarters are at most 2.
    found = {p: quantile_Q[p].item() for p in (0, 1, 250, 251, 750, 751, 1000)}
    assert found == {0: 1, 1: 1, 250: 1, 251: 2, 750: 2, 751: 3, 1000: 3}


def test_the_released_histogram_is_exact_to_a_bin_up_to_two_and_flat_beyond() -> None:
    draws_N = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs()
    exact_Q, binned_Q = exact_quantiles(draws_N), binned_quantiles(draws_N)
    low_Q = exact_Q < 1.999
    assert low_Q.sum() > 900
    torch.testing.assert_close(binned_Q[low_Q], exact_Q[low_Q], atol=2.1e-4, rtol=0)
    assert (binned_Q[exact_Q > 2] == 2).all()


@pytest.mark.parametrize("p", [0.3, 0.5, 0.7, 0.9])
def test_the_share_that_is_off_on_other_tokens_is_p(p) -> None:
    routing, _ = layer_of(p=p).route(random_inputs(4000, seed=6))
    assert 1 - routing.active_TB().float().mean().item() == pytest.approx(p, abs=0.02)


def test_masks_of_larger_p_are_nested() -> None:
    layer, x_TD = layer_of(), random_inputs(200)
    active = []
    for p in (0.0, 0.1, 0.5005, 0.9):
        layer.select = layer.select.with_budget(p)
        active.append(layer.route(x_TD)[0].active_TB())
    for larger_TB, smaller_TB in itertools.pairwise(active):
        assert (larger_TB >= smaller_TB).all()
        assert larger_TB.sum() > smaller_TB.sum()


@pytest.mark.parametrize("ffn", [random_ffn(), random_ffn(gated=False, bias=True, activation="gelu")])
@pytest.mark.parametrize("executor", ["auto", "masked", "gather"])
def test_p_zero_is_dense_although_the_smallest_calibration_score_is_larger_than_some(ffn, executor) -> None:
    layer, x_TD = layer_of(ffn, p=0.0, executor=executor), random_inputs(50)
    layer.select_state.quantile_Q.fill_(torch.inf)
    torch.testing.assert_close(layer(x_TD), ffn(x_TD), atol=1e-6, rtol=1e-5)


def test_a_score_equal_to_the_threshold_is_off() -> None:
    table = QuantileTable()
    table.quantile_Q.fill_(0.5)
    score_TB = torch.tensor([[0.5, 0.5000001, 0.4]])
    context = RoutingContext(num_blocks=3, state=table)
    routing = Quantile(p=0.3, prefill_dense_share=0.0)(score_TB, context)
    assert routing.active_TB().tolist() == [[False, True, False]]


def test_masked_and_gather_run_the_same_neurons() -> None:
    masked, gathered, x_TD = layer_of(), layer_of(executor="gather"), random_inputs(3)
    assert torch.equal(masked.route(x_TD)[0].active_TB(), gathered.route(x_TD)[0].active_TB())
    torch.testing.assert_close(masked(x_TD), gathered(x_TD), atol=1e-6, rtol=1e-5)


def test_the_sparse_output_is_that_of_the_dense_ffn_with_small_gates_at_zero() -> None:
    ffn, x_TD = random_ffn(), random_inputs(20)
    layer = layer_of(ffn)
    gate_TF = ACT2FN["silu"](x_TD @ ffn.gate_FD.mT)
    gate_TF = torch.where(gate_TF.abs() > layer.select_state.threshold(0.5), gate_TF, 0.0)
    torch.testing.assert_close(layer(x_TD), (gate_TF * (x_TD @ ffn.up_FD.mT)) @ ffn.down_FD, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("share", "dense"), [(0.0, 0), (0.01, 1), (0.1, 1), (0.11, 2), (1.0, 10)])
def test_the_first_tokens_of_every_prefill_are_dense(share, dense) -> None:
    layer = layer_of(p=0.9, dense_share=share)
    routing, _ = layer.route(random_inputs(30), num_sequences=3)
    whole_NC = routing.active_TB().all(1).view(3, 10)
    assert whole_NC[:, :dense].all()
    assert not whole_NC[:, dense:].any()


def test_a_decode_step_is_sparse_whatever_its_position() -> None:
    layer = layer_of(p=0.9, dense_share=0.5)
    routing, _ = layer.route(random_inputs(3), num_sequences=3)
    assert not routing.active_TB().all(1).any()


def test_thresholds_that_were_never_found_are_said() -> None:
    layer = layer_of()
    layer.select_state.quantile_Q.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"never found: .*FitQuantiles"):
        layer(random_inputs(3))


@pytest.mark.parametrize(("name", "value"), [("p", 1.1), ("p", -0.1), ("prefill_dense_share", 2.0)])
def test_shares_out_of_range_are_refused(name, value) -> None:
    with pytest.raises(ValueError, match=rf"select\.{name}={value} is outside 0\.\.1"):
        Quantile(**{"p": 0.5, "prefill_dense_share": 0.0, name: value})


def cats_model(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    return convert_model(model, [layer_of(site.read()) for site in find_ffns(model)]).eval()


def test_thresholds_are_saved_with_the_model(tmp_path) -> None:
    model, ids = cats_model("llama"), torch.arange(3, 19)[None]
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for layer, again in zip(sparse_layers(model), sparse_layers(loaded), strict=True):
        assert torch.equal(layer.select_state.quantile_Q, again.select_state.quantile_Q)


@pytest.mark.parametrize(("family", "routed"), [("llama", 2 / 3), ("gpt2", 1 / 2)])
@pytest.mark.parametrize("off", [0.5, 0.75])
def test_cost_is_that_of_a_dense_gate_and_the_surviving_rows_of_the_rest(family, routed, off) -> None:
    dense, own = read_anatomy(tiny_model(family)), read_anatomy(cats_model(family))
    blocks_L = [(1 - off) * layer.num_blocks for layer in own.ffns]
    record = cost_record(dense, own, blocks_L=blocks_L)
    assert record["router_flops_per_token"] == 0
    assert record["active_ffn_frac"] == pytest.approx(1 - routed * off)
    assert record["ffn_flops_per_token"] == pytest.approx((1 - routed * off) * record["dense_ffn_flops_per_token"])
    phi = record["dense_ffn_bytes_per_token"] / record["dense_model_bytes_per_token"]
    ratio = record["model_bytes_per_token"] / record["dense_model_bytes_per_token"]
    biases = 1e-2 if family == "gpt2" else 0  # the bias of the first product is read in full, too
    assert ratio == pytest.approx(1 - phi * routed * off, abs=1e-9 + biases)


def test_the_ideal_decode_ratio_at_half_the_neurons_and_an_ffn_share_of_64_percent() -> None:
    dense, own = read_anatomy(tiny_model("llama")), read_anatomy(cats_model("llama"))
    ffn_bytes = sum(layer.block.nbytes for layer in dense.ffns)
    rest = {
        "body": Matrix(parameters=0, nbytes=round(ffn_bytes * 0.36 / 0.64)),
        "head": Matrix(parameters=0, nbytes=0),
        "attention": replace(dense.attention, cache_bytes=0),
    }
    dense, own = replace(dense, **rest), replace(own, **rest)
    call = Call(batch_size=1, tokens=1, context=0)
    half = [Load(assignments=layer.num_blocks / 2, union=layer.num_blocks / 2) for layer in own.ffns]
    bound_by_bytes = Ceilings(
        copy_bytes_per_s=1.0, matmul_flops_per_s=1e30, copy_nbytes=1, dtype="float32", threads=1, device="cpu"
    )
    own_seconds, dense_seconds = (
        ideal_seconds(call_work(anatomy, call, loads), bound_by_bytes)
        for anatomy, loads in ((own, half), (dense, full_loads(dense, call)))
    )
    assert own_seconds / dense_seconds == pytest.approx(0.7867, abs=1e-4)


def test_all_neurons_on_cost_what_the_dense_model_costs() -> None:
    dense, own = read_anatomy(tiny_model("llama")), read_anatomy(cats_model("llama"))
    record = cost_record(dense, own)
    assert record["active_ffn_frac"] == 1
    assert record["model_flops_per_token"] == record["dense_model_flops_per_token"]
    assert record["model_bytes_per_token"] == record["dense_model_bytes_per_token"]
