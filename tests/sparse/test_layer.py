"""The sparse layer: identity with the dense FFN, static slices, constants, precision, budgets."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from toy_ffns import block_outputs, random_experts, random_ffn, random_inputs

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.combine import Combine
from moesaic.sparse.executors import EXECUTORS
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN, set_budget, set_executor, sparse_layers
from moesaic.sparse.routing import Routing
from moesaic.sparse.score import Linear, Oracle, Score, ScoreModule, SubsetOracle
from moesaic.sparse.select import AllBlocks, Prefix, RoutingContext, Selection, Threshold, TopK
from moesaic.sparse.trace import count_routing

NUM_BLOCKS, DIM = 4, 8
LABELS = {
    "contiguous": torch.arange(32) // 8,
    "striped": torch.arange(32) % 4,
    "random": torch.randperm(32, generator=torch.Generator().manual_seed(9)) % 4,
}


def make_layer(
    ffn: DenseFFN,
    select: Selection,
    *,
    score: Score | None = None,
    combine: Combine | None = None,
    executor: str = "auto",
    block_F: Tensor | None = None,
) -> SparseFFN:
    experts = random_experts(ffn, NUM_BLOCKS) if block_F is None else Experts.from_dense(ffn, block_F)
    module = None if score is None else score.build(ffn.dim, NUM_BLOCKS)
    if module is not None:
        module.initialise(experts, None, generator=torch.Generator().manual_seed(4))
    return SparseFFN(experts, module, select, (combine or Combine()).build(ffn.dim, NUM_BLOCKS), executor).eval()


def ffn_of_32(**kwargs: bool) -> DenseFFN:
    return random_ffn(dim=DIM, width=32, **kwargs)


@pytest.mark.parametrize("executor", ["auto", *EXECUTORS])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("select", [AllBlocks(), Prefix(k=NUM_BLOCKS), TopK(k=NUM_BLOCKS)])
def test_all_blocks_equal_the_dense_ffn(executor: str, labels: str, gated: bool, bias: bool, select: Selection) -> None:
    ffn = ffn_of_32(gated=gated, bias=bias)
    layer = make_layer(ffn, select, score=Linear(), executor=executor, block_F=LABELS[labels])
    x_TD = random_inputs(5)
    torch.testing.assert_close(layer(x_TD), ffn(x_TD))


@pytest.mark.parametrize("shape", [(DIM,), (1, DIM), (2, 3, DIM), (2, 1, 3, DIM), (0, DIM), (2, 0, DIM)])
@pytest.mark.parametrize("executor", ["auto", "masked", "loop", "grouped", "gather"])
@pytest.mark.parametrize("select", [AllBlocks(), TopK(k=2), Prefix(k=2)])
def test_any_batch_and_length(shape: tuple[int, ...], executor: str, select: Selection) -> None:
    layer = make_layer(ffn_of_32(bias=True), select, score=Linear(), executor=executor)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, DIM), layer(x.reshape(-1, DIM)))


@pytest.mark.parametrize("executor", ["auto", "masked", "loop", "grouped", "gather"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_routed_output_is_the_weighted_sum_of_blocks(executor: str, k: int) -> None:
    layer = make_layer(
        ffn_of_32(bias=True),
        TopK(k=k),
        score=Linear(activation="sigmoid"),
        combine=Combine(weight="score", scale="ratio"),
        executor=executor,
    )
    x_TD = random_inputs(6)
    score_TB = layer.score.activate(layer.score(x_TD, layer.experts))
    out_TBD = block_outputs(layer.experts, x_TD)
    expected_TD = torch.zeros(6, DIM, dtype=torch.float64)
    for t in range(6):
        expected_TD[t] += layer.experts.down_bias_D.double()
        for b in score_TB[t].argsort(descending=True)[:k].tolist():
            expected_TD[t] += score_TB[t, b].double() * NUM_BLOCKS / k * out_TBD[t, b]
    torch.testing.assert_close(layer(x_TD).double(), expected_TD, atol=1e-5, rtol=1e-5)


def test_a_token_without_a_block_gets_the_bias_where_the_fill_says_so() -> None:
    layer = make_layer(ffn_of_32(bias=True), Threshold(tau=0.2), score=Linear(), combine=Combine(fill="bias"))
    plain = make_layer(ffn_of_32(bias=True), Threshold(tau=0.2), score=Linear())
    x_TD = random_inputs(30)
    idle_T = layer.route(x_TD)[0].count_T() == 0
    assert 0 < idle_T.sum() < 30
    assert torch.equal(layer(x_TD)[~idle_T], plain(x_TD)[~idle_T])
    assert torch.equal(layer(x_TD)[idle_T], layer.experts.down_bias_D.expand(int(idle_T.sum()), -1))


@pytest.mark.parametrize("executor", ["auto", "masked", "loop", "grouped", "gather"])
def test_a_token_without_a_block_gets_exactly_zero_bias_included(executor: str) -> None:
    layer = make_layer(ffn_of_32(bias=True), Threshold(tau=0.2), score=Linear(), executor=executor)
    x_TD = random_inputs(32)
    routing, _ = layer.route(x_TD)
    idle_T = routing.count_T() == 0
    assert idle_T.any()
    assert not idle_T.all()
    assert not layer(x_TD)[idle_T].any()
    assert layer(x_TD)[~idle_T].all()


@pytest.mark.parametrize("select", [TopK(k=0), Prefix(k=0)])
@pytest.mark.parametrize("executor", ["auto", "masked", "loop", "grouped", "gather"])
def test_no_block_for_anyone_is_zero(select: Selection, executor: str) -> None:
    layer = make_layer(ffn_of_32(bias=True), select, score=Linear(), executor=executor)
    assert not layer(random_inputs(3)).any()


@pytest.mark.parametrize("select", [TopK(k=0), TopK(k=2), Prefix(k=2), AllBlocks()])
def test_mean_outputs_stand_in_for_idle_blocks(select: Selection) -> None:
    layer = make_layer(ffn_of_32(bias=True), select, score=Linear(), combine=Combine(fill="mean"))
    x_TD = random_inputs(5)
    layer.combine.initialise(layer.experts, random_inputs(50, seed=2))
    active_TB, out_TBD = layer.route(x_TD)[0].active_TB(), block_outputs(layer.experts, x_TD)
    for t, y_D in enumerate(layer(x_TD)):
        expected_D = layer.experts.down_bias_D.double()
        for b in range(NUM_BLOCKS):
            expected_D = expected_D + (out_TBD[t, b] if active_TB[t, b] else layer.combine.mean_BD[b].double())
        torch.testing.assert_close(y_D.double(), expected_D, atol=1e-5, rtol=1e-5)


class Refusing(nn.Module):
    """Stands where nothing must be asked."""

    def forward(self, *_: object) -> Tensor:
        raise AssertionError("routing was computed")


@pytest.mark.parametrize("k", [1, 3, NUM_BLOCKS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_static_width_is_a_slice_without_routing(k: int, dtype: torch.dtype) -> None:
    layer = make_layer(ffn_of_32(bias=True), Prefix(k=k)).to(dtype)
    layer.score = Refusing()  # type: ignore[assignment]
    x_TD = random_inputs(5).to(dtype)
    y_TD = layer(x_TD)
    reference = make_layer(ffn_of_32(bias=True), Prefix(k=k), executor="masked").to(dtype)
    torch.testing.assert_close(y_TD, reference(x_TD))
    y_TD.float().sum().backward()
    assert layer.experts.up_BSD.grad is not None
    assert not layer.experts.up_BSD.grad[k:].any()


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_is_that_of_the_dense_ffn_and_only_in_training(p: float) -> None:
    ffn = random_ffn(dim=DIM, width=32)
    layer = make_layer(ffn, AllBlocks())
    layer.experts.dropout = p
    x_TD = random_inputs(50)
    torch.testing.assert_close(layer(x_TD), ffn(x_TD))
    layer.train()
    torch.manual_seed(0)
    y_TD = layer(x_TD)
    dropped_frac = (y_TD == 0).float().mean().item()
    assert dropped_frac == pytest.approx(p, abs=0.1)
    torch.testing.assert_close(y_TD, torch.where(y_TD == 0, 0.0, ffn(x_TD) / (1 - p)))


@pytest.mark.parametrize("score", [Linear(activation="softmax"), Oracle(target="l2sq")])
def test_routing_is_computed_in_float32_whatever_the_caller_uses(score: Score) -> None:
    layer = make_layer(ffn_of_32(), TopK(k=2), score=score)
    x_TD = random_inputs(20).bfloat16().float()
    routing, score_TB = layer.route(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, autocast_TB = layer.route(x_TD)
        assert layer(x_TD).dtype == torch.bfloat16
    assert autocast_TB.dtype == score_TB.dtype == torch.float32
    assert torch.equal(autocast_TB, score_TB)
    assert torch.equal(under_autocast.block_N, routing.block_N)
    layer.experts.bfloat16()
    _, half_TB = layer.route(x_TD.bfloat16())
    assert half_TB.dtype == torch.float32
    if isinstance(score, Linear):  # an oracle looks at the experts, which are rounded now
        assert torch.equal(half_TB, score_TB)


def test_a_joint_oracle_sets_the_routing_itself() -> None:
    layer = make_layer(ffn_of_32(), TopK(k=2), score=SubsetOracle())
    x_TD = random_inputs(6)
    out_TBD = block_outputs(layer.experts, x_TD)
    active_TB = layer.route(x_TD)[0].active_TB()
    pairs = [(b, c) for b in range(NUM_BLOCKS) for c in range(b)]
    for t in range(6):
        errors = {pair: (out_TBD[t].sum(0) - out_TBD[t, list(pair)].sum(0)).norm().item() for pair in pairs}
        best = min(errors, key=errors.__getitem__)
        assert sorted(best) == active_TB[t].nonzero().flatten().tolist()


def test_dense_straight_through_trains_idle_blocks_on_the_masked_path() -> None:
    layer = make_layer(ffn_of_32(bias=True), TopK(k=1), score=Linear(), combine=Combine(straight_through="dense"))
    x_TD = random_inputs(5)
    expected_TD = layer(x_TD)
    layer.train()
    y_TD = layer(x_TD)
    torch.testing.assert_close(y_TD, expected_TD)
    y_TD.square().sum().backward()
    assert (layer.score.weight_BD.grad.abs().sum(1) > 0).all()
    layer.executor = "grouped"
    with pytest.raises(ValueError, match=r"executor=grouped cannot train combine.straight_through=dense"):
        layer(x_TD)


def test_dense_straight_through_keeps_the_bias_from_tokens_without_a_block() -> None:
    layer = make_layer(ffn_of_32(bias=True), TopK(k=0), score=Linear(), combine=Combine(straight_through="dense"))
    assert not layer.train()(random_inputs(3)).any()


@pytest.mark.parametrize("executor", ["masked", "loop", "grouped", "gather"])
def test_gradients_reach_the_router_through_every_executor(executor: str) -> None:
    combine = Combine(weight="score")
    reference = make_layer(ffn_of_32(), TopK(k=2), score=Linear(activation="sigmoid"), combine=combine)
    layer = make_layer(ffn_of_32(), TopK(k=2), score=Linear(activation="sigmoid"), combine=combine, executor=executor)
    reference.executor = "masked"
    for each in (reference, layer):
        each(random_inputs(9)).square().sum().backward()
    for wanted, got in zip(reference.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)


@dataclass(frozen=True, kw_only=True, slots=True)
class Twice(Score):
    """A score of another package: no registration, no edit."""

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _TwiceModule(self)


class _TwiceModule(ScoreModule):
    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        return 2 * x_TD[:, : experts.num_blocks].float()


def test_a_score_from_outside_the_package_works() -> None:
    layer = make_layer(ffn_of_32(), TopK(k=1), score=Twice())
    x_TD = random_inputs(9)
    assert torch.equal(layer.route(x_TD)[0].active_TB().int().argmax(1), x_TD[:, :NUM_BLOCKS].argmax(1))


@pytest.mark.parametrize(
    ("select", "combine"),
    [(TopK(k=1), Combine()), (AllBlocks(), Combine(weight="score")), (Threshold(tau=0), Combine())],
)
def test_no_score_where_one_is_needed_is_refused(select: Selection, combine: Combine) -> None:
    with pytest.raises(ValueError, match="needs a score"):
        make_layer(ffn_of_32(), select, combine=combine)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k=5 exceeds partition.num_blocks=4"):
        make_layer(ffn_of_32(), TopK(k=5), score=Linear())
    with pytest.raises(ValueError, match=r"did you mean 'masked'"):
        make_layer(ffn_of_32(), AllBlocks(), executor="maskd")


def two_layers() -> nn.Module:
    return nn.Sequential(*(make_layer(ffn_of_32(), TopK(k=1), score=Linear()) for _ in range(2)))


def test_sparse_layers_come_in_module_order() -> None:
    model = two_layers()
    assert sparse_layers(model) == [model[0], model[1]]
    assert sparse_layers(nn.Linear(2, 2)) == []


def test_set_budget_for_all_and_for_each() -> None:
    model = two_layers()
    set_budget(model, 3)
    assert [layer.select for layer in sparse_layers(model)] == [TopK(k=3), TopK(k=3)]
    set_budget(model, [1, 4])
    assert [layer.select for layer in sparse_layers(model)] == [TopK(k=1), TopK(k=4)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 9], "k=9 exceeds"),
        (1.5, "k=1.5 is not a whole number"),
        ([1], "1 budgets are given, but .* 2 sparse layers"),
    ],
)
def test_a_refused_budget_changes_nothing(value: float | list[float], message: str) -> None:
    model = two_layers()
    with pytest.raises(ValueError, match=message):
        set_budget(model, value)
    assert [layer.select for layer in sparse_layers(model)] == [TopK(k=1), TopK(k=1)]


def test_set_executor() -> None:
    model = two_layers()
    set_executor(model, "loop")
    assert [layer.executor for layer in sparse_layers(model)] == ["loop", "loop"]
    with pytest.raises(ValueError, match="Allowed: masked, loop, grouped, gather, dense, auto"):
        set_executor(model, "triton")
    assert "executor=loop" in repr(model)
    assert "num_blocks=4, block_size=8, dim=8, gated" in repr(model)


@dataclass(frozen=True, kw_only=True, slots=True)
class CountingTopK(TopK):
    """Top-k that counts, in its state, the tokens that it saw in training, and notes k."""

    def state(self, num_blocks: int) -> nn.Module:
        state = nn.Module()
        state.register_buffer("seen", torch.zeros(()))
        return state

    def __call__(self, score_TB: Tensor, context: RoutingContext | None = None) -> Routing:
        assert context is not None
        assert context.state is not None
        if context.training:
            context.state.seen += context.num_sequences
        context.note(k=torch.tensor(float(self.k)))
        return TopK.__call__(self, score_TB, context)


def test_the_state_of_a_selection_outlives_its_budget_and_not_its_class() -> None:
    layer = make_layer(ffn_of_32(), CountingTopK(k=2), score=Linear()).train()
    x = torch.randn(3, 5, DIM)
    layer(x)
    layer.select = CountingTopK(k=1)
    layer(x)
    assert layer.select_state.seen == 6
    assert "select_state.seen" in layer.state_dict()
    layer.eval()(x)
    assert layer.select_state.seen == 6
    layer.select = TopK(k=1)
    assert layer.select_state is None
    layer.select = CountingTopK(k=1)
    assert layer.select_state.seen == 0


def test_what_a_selection_notes_is_averaged_over_tokens() -> None:
    layer = make_layer(ffn_of_32(), CountingTopK(k=2), score=Linear())
    with count_routing(layer) as counts:
        layer(torch.randn(1, 6, DIM))
        layer.select = CountingTopK(k=1)
        layer(torch.randn(1, 2, DIM))
    assert counts.notes_L() == {"k": [pytest.approx((6 * 2 + 2 * 1) / 8)]}
