"""Combination: weights against a loop, scales by hand, straight-through gradients, fills against mean outputs."""

import math

import pytest
import torch
from torch import Tensor
from toy_ffns import block_outputs, random_experts, random_ffn, random_inputs

from moesaic.sparse.combine import Combine, scale_by_count
from moesaic.sparse.executors import masked
from moesaic.sparse.routing import Routing
from moesaic.sparse.select import AllBlocks, Threshold, TopK

NUM_BLOCKS = 4


def scores(seed: int = 0) -> Tensor:
    return torch.rand(10, NUM_BLOCKS, generator=torch.Generator().manual_seed(seed))


def looped_weights(routing: Routing, score_TB: Tensor, weight: str, scale: str) -> Tensor:
    active_TB = routing.active_TB()
    expected_TB = torch.zeros_like(score_TB)
    for t in range(len(score_TB)):
        chosen = [b for b in range(NUM_BLOCKS) if active_TB[t, b]]
        for b in chosen:
            value = {
                "one": 1.0,
                "score": score_TB[t, b].item(),
                "renormalised": score_TB[t, b].item() / sum(score_TB[t, c].item() for c in chosen),
            }[weight]
            n = len(chosen)
            factor = {
                "one": 1.0,
                "count": float(n),
                "total": float(NUM_BLOCKS),
                "ratio": NUM_BLOCKS / n,
                "floor_ratio": float(NUM_BLOCKS // n),
                "sqrt_ratio": math.sqrt(NUM_BLOCKS / n),
            }[scale]
            expected_TB[t, b] = value * factor
    return expected_TB


@pytest.mark.parametrize("scale", ["one", "count", "total", "ratio", "floor_ratio", "sqrt_ratio"])
@pytest.mark.parametrize("weight", ["one", "score", "renormalised"])
@pytest.mark.parametrize("select", [TopK(k=2), TopK(k=0), Threshold(tau=0.6), AllBlocks()], ids=repr)
def test_weights_against_a_loop(select: object, weight: str, scale: str) -> None:
    score_TB = scores()
    routing = select(score_TB)
    combined = Combine(weight=weight, scale=scale).build(8, NUM_BLOCKS)(routing, score_TB)
    torch.testing.assert_close(combined.weight_TB(), looped_weights(routing, score_TB, weight, scale))
    assert torch.equal(combined.counts_B, routing.counts_B)
    assert combined.weight_N.dtype == torch.float32


@pytest.mark.parametrize(
    ("rule", "num_blocks", "expected"),
    [
        ("floor_ratio", 4, {0: 1, 1: 4, 2: 2, 3: 1, 4: 1}),
        ("floor_ratio", 8, {3: 2}),
        ("ratio", 4, {0: 1, 3: 4 / 3, 4: 1}),
        ("count", 4, {0: 0, 1: 1, 3: 3}),
        ("total", 4, {0: 4, 1: 4, 3: 4}),
        ("sqrt_ratio", 4, {0: 1, 1: 2, 2: math.sqrt(2), 4: 1}),
    ],
)
def test_scales_of_the_method_pages(rule: str, num_blocks: int, expected: dict[int, float]) -> None:
    found_T = scale_by_count(torch.tensor(list(expected)), num_blocks, rule)
    torch.testing.assert_close(found_T, torch.tensor(list(expected.values()), dtype=torch.float32))


def test_fitted_scale_is_looked_up_by_a_tokens_own_count() -> None:
    score_TB = scores()
    routing = Threshold(tau=0.6)(score_TB)
    module = Combine(scale="fitted").build(8, NUM_BLOCKS)
    torch.testing.assert_close(module(routing, score_TB).weight_N, torch.ones_like(routing.weight_N))
    module.scale_X.copy_(torch.tensor([1.0, 1.9, 1.4, 1.2, 1.0]))
    weight_TB = module(routing, score_TB).weight_TB()
    for token, count in enumerate(routing.count_T().tolist()):
        chosen = weight_TB[token][weight_TB[token] != 0]
        torch.testing.assert_close(chosen, module.scale_X[count].expand(count))
    assert "scale_X" in module.state_dict()
    assert not list(module.parameters())


def test_learned_scale_starts_at_one_and_gets_a_gradient() -> None:
    score_TB = scores()
    module = Combine(scale="learned").build(8, NUM_BLOCKS)
    combined = module(TopK(k=2)(score_TB), score_TB)
    assert (combined.weight_N == 1).all()
    combined.weight_N.sum().backward()
    assert module.scale.grad.item() == 20


@pytest.mark.parametrize("straight_through", ["selected", "dense"])
@pytest.mark.parametrize("activation", [torch.sigmoid, lambda r: r.softmax(1)], ids=["sigmoid", "softmax"])
def test_straight_through_is_bitwise_one_forward_and_reaches_the_router(
    straight_through: str, activation: object
) -> None:
    logits_TB = (10 * scores()).requires_grad_()
    score_TB = activation(logits_TB)
    module = Combine(straight_through=straight_through).build(8, NUM_BLOCKS).train()
    routing = TopK(k=2)(score_TB)
    combined = module(routing, score_TB)
    assert torch.equal(combined.weight_TB(), routing.active_TB().float())
    assert torch.equal(combined.counts_B, routing.counts_B)
    effect_TB = torch.randn(10, NUM_BLOCKS, generator=torch.Generator().manual_seed(1))
    (combined.weight_TB() * effect_TB).sum().backward()
    assert logits_TB.grad.abs().sum() > 0


def test_straight_through_gradients_of_scores() -> None:
    """selected: the effect of a block on the loss where it runs, else 0. dense: of every block. Eval: none is added."""
    effect_TB = torch.randn(10, NUM_BLOCKS, generator=torch.Generator().manual_seed(1))
    for straight_through, everywhere in (("selected", False), ("dense", True)):
        score_TB = scores().requires_grad_()
        routing = TopK(k=2)(score_TB)
        module = Combine(straight_through=straight_through, scale="ratio").build(8, NUM_BLOCKS)
        (module(routing, score_TB).weight_TB() * effect_TB).sum().backward()
        reached_TB = torch.ones_like(score_TB) if everywhere else routing.active_TB().float()
        torch.testing.assert_close(score_TB.grad, 2.0 * effect_TB * reached_TB)
        assert module.eval()(routing, score_TB).token_N.numel() == 20


def test_the_other_brackets_would_round() -> None:
    score = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert not torch.equal((1 + score) - score, torch.ones(1000))
    assert torch.equal(1 + (score - score), torch.ones(1000))


def test_dense_straight_through_runs_on_the_masked_executor_and_reaches_unselected_blocks() -> None:
    experts, x_TD = random_experts(random_ffn(), NUM_BLOCKS), random_inputs(10)
    score_TB = scores().requires_grad_()
    routing = TopK(k=1)(score_TB)
    combined = Combine(straight_through="dense").build(8, NUM_BLOCKS)(routing, score_TB)
    y_TD = masked(x_TD, experts, combined)
    torch.testing.assert_close(y_TD, masked(x_TD, experts, routing))
    y_TD[:, 0].sum().backward()
    torch.testing.assert_close(score_TB.grad, block_outputs(experts, x_TD)[:, :, 0].float())


def test_no_straight_through_no_gradient() -> None:
    score_TB = scores().requires_grad_()
    combined = Combine().build(8, NUM_BLOCKS)(TopK(k=2)(score_TB), score_TB)
    assert not combined.weight_N.requires_grad


def test_the_trap_of_one_selected_block() -> None:
    """A softmax over the k selected logits is constant at k = 1: exactly no gradient."""
    logits_TB = scores().requires_grad_()
    logits_TB.gather(1, logits_TB.argmax(1, keepdim=True)).softmax(1).sum().backward()
    assert logits_TB.grad.count_nonzero() == 0
    logits_TB.grad = None
    score_TB = logits_TB.softmax(1)
    combined = Combine(weight="renormalised").build(8, NUM_BLOCKS)(TopK(k=1)(score_TB), score_TB)
    (combined.weight_N * torch.arange(10.0)).sum().backward()
    assert logits_TB.grad.abs().max() < 1e-5


def test_scores_as_weights_train_the_router() -> None:
    score_TB = scores().requires_grad_()
    combined = Combine(weight="score", scale="sqrt_ratio").build(8, NUM_BLOCKS)(TopK(k=1)(score_TB), score_TB)
    combined.weight_N.sum().backward()
    torch.testing.assert_close(score_TB.grad, 2.0 * TopK(k=1)(score_TB).active_TB())


@pytest.mark.parametrize("gated", [True, False])
def test_mean_fill_is_dense_with_all_blocks_and_the_mean_dense_output_with_none(gated: bool) -> None:
    ffn = random_ffn(gated=gated)
    experts, x_TD = random_experts(ffn, NUM_BLOCKS), random_inputs(30)
    module = Combine(fill="mean").build(8, NUM_BLOCKS)
    module.initialise(experts, x_TD)
    score_TB = torch.rand(30, NUM_BLOCKS, generator=torch.Generator().manual_seed(0))
    mean_BD = block_outputs(experts, x_TD).mean(0).float()
    for k in range(NUM_BLOCKS + 1):
        routing = TopK(k=k)(score_TB)
        fill_TD = module.fill(module(routing, score_TB))
        for token in range(30):
            idle = ~routing.active_TB()[token]
            torch.testing.assert_close(fill_TD[token], mean_BD[idle].sum(0), atol=1e-6, rtol=1e-5)
        if k == 0:
            torch.testing.assert_close(fill_TD, ffn(x_TD).mean(0).expand(30, 8), atol=1e-6, rtol=1e-5)
    assert (fill_TD == 0).all()


def test_fill_with_dense_straight_through_is_that_of_the_selected_blocks() -> None:
    module = Combine(fill="mean", straight_through="dense").build(8, NUM_BLOCKS)
    module.mean_BD.copy_(random_inputs(NUM_BLOCKS))
    score_TB = scores()
    routing = TopK(k=2)(score_TB)
    torch.testing.assert_close(module.fill(module(routing, score_TB)), module.fill(routing))


def test_zero_fill_has_no_buffers_and_no_output() -> None:
    module = Combine().build(8, NUM_BLOCKS)
    module.initialise(random_experts(random_ffn(), NUM_BLOCKS), random_inputs(5))
    assert module.fill(TopK(k=1)(scores())) is None
    assert not module.state_dict()


@pytest.mark.parametrize(
    ("gated", "activation", "expected"),
    [(False, "relu", "zero"), (True, "relu", "zero"), (True, "silu", "mean"), (False, "gelu", "mean")],
)
def test_auto_fill(gated: bool, activation: str, expected: str) -> None:
    auto = Combine(fill="auto", scale="ratio")
    ffn = random_ffn(gated=gated, activation=activation)
    assert auto.for_ffn(ffn) == Combine(fill=expected, scale="ratio")
    assert Combine(fill="mean").for_ffn(ffn) == Combine(fill="mean")
    with pytest.raises(ValueError, match=r"combine\.fill=auto depends on the FFN"):
        auto.build(8, NUM_BLOCKS)


@pytest.mark.parametrize("weight", ["score", "renormalised"])
def test_two_ways_to_a_gradient_are_refused(weight: str) -> None:
    with pytest.raises(ValueError, match=f"straight_through=selected.*combine.weight={weight} has its own"):
        Combine(weight=weight, straight_through="selected")


def test_plain_means_that_every_weight_is_one_and_nothing_is_filled() -> None:
    plain, filled, scaled = (Combine(**options) for options in ({}, {"fill": "mean"}, {"scale": "ratio"}))
    scored, through = Combine(weight="score"), Combine(straight_through="selected")
    modules = [config.build(8, NUM_BLOCKS) for config in (plain, filled, scaled, scored, through)]
    assert [module.plain for module in modules] == [True, False, False, False, False]
    assert [module.uses_score for module in modules] == [False, False, False, True, True]
