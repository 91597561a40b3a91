"""Executors against two nested loops over tokens and blocks, outputs and gradients."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toy_ffns import random_experts, random_ffn, random_inputs
from transformers.activations import ACT2FN

from moesaic.sparse import gather as gather_module
from moesaic.sparse.executors import (
    EXECUTORS,
    check_executor,
    choose_executor,
    routed_over_dense,
)
from moesaic.sparse.experts import Experts, ExpertsShape
from moesaic.sparse.gather import merge_adjacent
from moesaic.sparse.grouped import row_multiple
from moesaic.sparse.routing import Routing

NUM_BLOCKS = 4
ROUTED = ("masked", "loop", "grouped", "gather")
SIZES = {"aligned": (8, 32), "odd": (6, 20)}  # D, F


def active_cases() -> dict[str, Tensor]:
    some_TB = torch.rand(7, NUM_BLOCKS, generator=torch.Generator().manual_seed(3)) < 0.5
    some_TB[2] = False  # a token without a block
    some_TB[:, 1] = False  # a block without a token
    return {
        "some": some_TB,
        "one_token": torch.tensor([[True, False, False, True]]),
        "none": torch.zeros(3, NUM_BLOCKS, dtype=torch.bool),
        "all": torch.ones(3, NUM_BLOCKS, dtype=torch.bool),
        "no_tokens": torch.zeros(0, NUM_BLOCKS, dtype=torch.bool),
        "one_block": torch.arange(NUM_BLOCKS).expand(5, -1) == 2,
    }


def looped(x_TD: Tensor, experts: Experts, weight_TB: Tensor, active_TB: Tensor) -> Tensor:
    """The definition, in float64 and differentiable."""

    def wide(weight: Tensor | None, b: int) -> Tensor | None:
        return None if weight is None else weight[b].double()

    act = ACT2FN[experts.activation]
    rows = []
    for t in range(x_TD.shape[0]):
        row_D = torch.zeros(experts.dim, dtype=torch.float64) + 0 * x_TD[t].double()
        for b in range(experts.num_blocks):
            if active_TB[t, b]:
                up_S = F.linear(x_TD[t].double(), experts.up_BSD[b].double(), wide(experts.up_bias_BS, b))
                h_S = act(up_S)
                if experts.gate_BSD is not None:
                    gate_S = F.linear(x_TD[t].double(), experts.gate_BSD[b].double(), wide(experts.gate_bias_BS, b))
                    h_S = act(gate_S) * up_S
                row_D = row_D + weight_TB[t, b].double() * (h_S @ experts.down_BSD[b].double())
        rows.append(row_D)
    return torch.stack(rows) if rows else x_TD.double().reshape(0, experts.dim)


def gradients(y_TD: Tensor, x_TD: Tensor, weight_TB: Tensor, experts: Experts) -> dict[str, Tensor]:
    inputs = {"x": x_TD, "weight": weight_TB, **dict(experts.named_parameters())}
    inputs.pop("down_bias_D", None)  # the layer's part
    cost_TD = torch.linspace(-1, 1, y_TD.numel()).reshape(y_TD.shape).to(y_TD.dtype)
    found = torch.autograd.grad((y_TD * cost_TD).sum(), list(inputs.values()), allow_unused=True)
    return {
        name: torch.zeros_like(inputs[name]) if grad is None else grad for name, grad in zip(inputs, found, strict=True)
    }


def check_against_loops(executor: str, experts: Experts, active_TB: Tensor, tolerance: float) -> None:
    dtype = experts.up_BSD.dtype
    x_TD = random_inputs(len(active_TB), experts.dim).to(dtype).requires_grad_()
    weight_TB = torch.rand(active_TB.shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
    y_TD = EXECUTORS[executor](x_TD, experts, Routing.from_mask(active_TB, weight_TB))
    expected_TD = looped(x_TD, experts, weight_TB, active_TB)
    assert y_TD.dtype == dtype
    assert y_TD.shape == x_TD.shape
    assert not y_TD[~active_TB.any(1)].any()  # exactly 0
    torch.testing.assert_close(y_TD.double(), expected_TD, atol=tolerance, rtol=tolerance)
    if len(active_TB):
        got = gradients(y_TD, x_TD, weight_TB, experts)
        wanted = gradients(expected_TD, x_TD, weight_TB, experts)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("executor", ROUTED)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", active_cases())
def test_executor_equals_nested_loops(executor: str, gated: bool, bias: bool, size: str, case: str) -> None:
    dim, width = SIZES[size]
    experts = random_experts(random_ffn(dim=dim, width=width, gated=gated, bias=bias), NUM_BLOCKS)
    check_against_loops(executor, experts, active_cases()[case], 1e-5)


@pytest.mark.parametrize("executor", ROUTED)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("case", active_cases())
def test_executor_in_bfloat16(executor: str, gated: bool, case: str) -> None:
    experts = random_experts(random_ffn(width=32, gated=gated, bias=True), NUM_BLOCKS).to(torch.bfloat16)
    check_against_loops(executor, experts, active_cases()[case], 6e-2)


@pytest.mark.parametrize("executor", ROUTED)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu2", "sigmoid", "quick_gelu"])
def test_executor_with_any_activation(executor: str, activation: str) -> None:
    # Width 20 in 4 blocks is padded with zero neurons: sigmoid(0) is not 0, their down rows are.
    experts = random_experts(random_ffn(width=20, gated=False, bias=True, activation=activation), NUM_BLOCKS)
    check_against_loops(executor, experts, active_cases()["some"], 1e-5)


@pytest.mark.parametrize("executor", ["masked", "loop", "gather"])
def test_executor_in_float64(executor: str) -> None:
    experts = random_experts(random_ffn(width=32), NUM_BLOCKS).double()
    check_against_loops(executor, experts, active_cases()["some"], 1e-6)  # routing weights are float32


def test_grouped_refuses_float64_by_name() -> None:
    experts = random_experts(random_ffn(width=32), NUM_BLOCKS).double()
    routing = Routing.from_topk(torch.tensor([[1]]), None, NUM_BLOCKS)
    with pytest.raises(ValueError, match=r"executor=grouped got float64.*executor=loop"):
        EXECUTORS["grouped"](random_inputs(1).double(), experts, routing)


@pytest.mark.parametrize("executor", ROUTED)
def test_a_down_matrix_kept_in_float32(executor: str) -> None:
    experts = random_experts(random_ffn(width=32), NUM_BLOCKS).to(torch.bfloat16)
    experts.down_BSD.data = experts.down_BSD.data.float()
    active_TB = active_cases()["some"]
    x_TD = random_inputs(len(active_TB)).to(torch.bfloat16)
    y_TD = EXECUTORS[executor](x_TD, experts, Routing.from_mask(active_TB))
    assert y_TD.dtype == torch.float32
    expected_TD = looped(x_TD, experts, active_TB.float(), active_TB)
    torch.testing.assert_close(y_TD.double(), expected_TD, atol=6e-2, rtol=6e-2)


@pytest.mark.parametrize("executor", ROUTED)
def test_autocast_computes_in_bfloat16_with_float32_gradients(executor: str) -> None:
    experts = random_experts(random_ffn(width=32, bias=True), NUM_BLOCKS)
    active_TB = active_cases()["some"]
    x_TD = random_inputs(len(active_TB))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = EXECUTORS[executor](x_TD, experts, Routing.from_mask(active_TB))
    assert y_TD.dtype == torch.bfloat16
    expected_TD = looped(x_TD, experts, active_TB.float(), active_TB)
    torch.testing.assert_close(y_TD.double(), expected_TD, atol=6e-2, rtol=6e-2)
    y_TD.float().square().sum().backward()
    expected = torch.autograd.grad(expected_TD.square().sum(), experts.up_BSD)[0]
    assert experts.up_BSD.grad is not None
    assert experts.up_BSD.grad.dtype == torch.float32
    torch.testing.assert_close(experts.up_BSD.grad, expected, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("executor", ["loop", "grouped", "gather"])
@pytest.mark.parametrize("case", ["one_token", "one_block"])
def test_idle_blocks_are_not_read(executor: str, case: str) -> None:
    experts = random_experts(random_ffn(width=32), NUM_BLOCKS)
    active_TB = active_cases()[case]
    with torch.no_grad():
        for weight in (experts.gate_BSD, experts.up_BSD, experts.down_BSD):
            assert weight is not None
            weight[~active_TB.any(0)] = torch.nan
        y_TD = EXECUTORS[executor](random_inputs(len(active_TB)), experts, Routing.from_mask(active_TB))
    assert y_TD.isfinite().all()


@pytest.fixture(params=["slices", "one copy", "small copies", "mixed"])
def gather_regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    block_bytes = 2 * 8 * 4  # S 2, D 8, float32
    slice_bytes, chunk_bytes, few_runs = {
        "slices": (0, 0, 0),
        "one copy": (2**20, 2**20, 0),
        "small copies": (2**20, 2 * block_bytes, 0),
        "mixed": (2 * block_bytes, 2 * block_bytes, 0),
    }[request.param]
    monkeypatch.setattr(gather_module, "_SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(gather_module, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(gather_module, "_FEW_RUNS", few_runs)
    return str(request.param)


@pytest.mark.usefixtures("gather_regime")
@pytest.mark.parametrize("blocks", [[0], [15], [0, 1, 2, 5], [1, 3, 5, 7, 9], [0, 1, 4, 5, 6, 9, 11], list(range(16))])
def test_gather_reads_blocks_in_whatever_way(blocks: list[int]) -> None:
    experts = random_experts(random_ffn(width=32, bias=True), 16)
    active_TB = torch.zeros(3, 16, dtype=torch.bool)
    active_TB[0, blocks] = True
    active_TB[2, blocks[0]] = True
    check_against_loops("gather", experts, active_TB, 1e-5)


def test_gather_does_not_copy_adjacent_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_module, "_SLICE_BYTES", 0)
    experts = random_experts(random_ffn(width=32), 16)
    monkeypatch.setattr(Experts, "copy_rows", lambda *_: pytest.fail("copied"))
    seen: list[int] = []
    hidden = Experts.hidden
    monkeypatch.setattr(Experts, "hidden", lambda self, x, rows: seen.append(len(rows.up_RD)) or hidden(self, x, rows))
    gather_module.gather(random_inputs(1), experts, Routing.from_topk(torch.tensor([[4, 7, 5, 1]]), None, 16))
    assert seen == [2, 4, 2]  # blocks 1, 4-5 and 7, of two neurons each


@pytest.mark.parametrize("blocks", [[], [3], [0, 1, 2], [0, 2, 4], [0, 1, 3, 4, 9]])
def test_merge_adjacent_covers_exactly_the_blocks(blocks: list[int]) -> None:
    ranges = merge_adjacent(blocks)
    assert [b for start, stop in ranges for b in range(start, stop)] == blocks
    assert all(left[1] < right[0] for left, right in itertools.pairwise(ranges))


@pytest.mark.parametrize("gated", [True, False])
def test_dense_runs_all_blocks_and_nothing_else(gated: bool) -> None:
    ffn = random_ffn(width=32, gated=gated)
    experts, x_TD = random_experts(ffn, NUM_BLOCKS), random_inputs(3)
    every = Routing.from_prefix(NUM_BLOCKS, num_tokens=3, num_blocks=NUM_BLOCKS)
    torch.testing.assert_close(EXECUTORS["dense"](x_TD, experts, every), ffn(x_TD))
    for other in (every.with_weight(every.weight_N * 2), Routing.from_prefix(2, num_tokens=3, num_blocks=NUM_BLOCKS)):
        with pytest.raises(ValueError, match="every block with weight 1"):
            EXECUTORS["dense"](x_TD, experts, other)


def test_unknown_executor_is_refused_with_the_nearest() -> None:
    assert check_executor("auto") == "auto"
    with pytest.raises(ValueError, match=r"'groupd' is unknown; did you mean 'grouped'\?"):
        check_executor("groupd")


def shell(*, dim: int, width: int, num_blocks: int, dtype: torch.dtype = torch.float32) -> Experts:
    shape = ExpertsShape(num_blocks=num_blocks, block_size=width // num_blocks, dim=dim, activation="silu", gated=True)
    with torch.device("meta"):
        return Experts(shape).to(dtype)


LARGE = {"dim": 2048, "width": 5632}


@pytest.mark.parametrize(
    ("sizes", "dtype", "num_tokens", "share", "grad", "expected"),
    [
        ({**LARGE, "num_blocks": 4}, torch.bfloat16, 1, 0.25, False, "gather"),
        ({**LARGE, "num_blocks": 176}, torch.bfloat16, 1, 0.5, False, "gather"),
        ({**LARGE, "num_blocks": 176}, torch.bfloat16, 8, 0.25, False, "masked"),  # together they want nearly all
        ({**LARGE, "num_blocks": 8}, torch.float32, 8, 0.25, False, "grouped"),
        ({**LARGE, "num_blocks": 8}, torch.bfloat16, 512, 0.25, False, "grouped"),
        ({**LARGE, "num_blocks": 8}, torch.bfloat16, 512, 0.25, True, "grouped"),
        ({**LARGE, "num_blocks": 8}, torch.bfloat16, 512, 1.0, False, "masked"),
        ({**LARGE, "num_blocks": 8}, torch.float64, 512, 0.25, True, "loop"),
        ({**LARGE, "num_blocks": 176}, torch.float32, 512, 0.25, False, "loop"),
        ({**LARGE, "num_blocks": 176}, torch.bfloat16, 512, 0.5, False, "masked"),
        ({"dim": 2048, "width": 5628, "num_blocks": 4}, torch.bfloat16, 512, 0.25, False, "loop"),  # S 1407
        ({"dim": 16, "width": 48, "num_blocks": 4}, torch.float32, 1, 0.25, False, "masked"),  # all in cache
        ({"dim": 16, "width": 48, "num_blocks": 4}, torch.float32, 0, 0.25, False, "masked"),
    ],
)
def test_auto_chooses(
    sizes: dict[str, int], dtype: torch.dtype, num_tokens: int, share: float, grad: bool, expected: str
) -> None:
    experts = shell(**sizes, dtype=dtype)
    num_assignments = round(share * num_tokens * experts.num_blocks)
    assert choose_executor(num_tokens, experts, grad, num_assignments=num_assignments) == expected


def grid() -> Iterator[tuple[Experts, torch.dtype]]:
    for num_blocks, dtype in itertools.product((4, 176), (torch.float32, torch.bfloat16)):
        yield shell(**LARGE, num_blocks=num_blocks, dtype=dtype), dtype


def test_expected_gain_grows_with_tokens_and_falls_with_share() -> None:
    for experts, dtype in grid():
        by_tokens = [routed_over_dense(num_tokens, experts, 0.25, dtype) for num_tokens in (1, 16, 256, 4096)]
        by_share = [routed_over_dense(256, experts, share, dtype) for share in (0.1, 0.5, 1.0)]
        assert by_tokens == sorted(by_tokens, reverse=True)
        assert by_share == sorted(by_share)
        assert by_share[-1] > 1


def test_grouped_needs_rows_of_sixteen_bytes() -> None:
    assert (row_multiple(torch.float32), row_multiple(torch.bfloat16)) == (4, 8)
