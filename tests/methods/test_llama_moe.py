"""LLaMA-MoE: what the combination does at the start, what trains the router, and the balance loss in place."""

from dataclasses import fields

import pytest
import torch
from methods.toy import ids_NC, toy_conversion, toy_job, weights
from torch import Tensor

from moesaic.methods.base import SparseMethod, select_blocks
from moesaic.methods.controls import apply_arm
from moesaic.methods.llama_moe import BalancedFinetune, BalancedTraining, LlamaMoE, balance_loss
from moesaic.methods.lm import task_loss
from moesaic.sparse.balance import load, squared_variation
from moesaic.sparse.combine import Combine
from moesaic.sparse.gradient import Gradient
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.noisy import Noisy
from moesaic.sparse.partition import Random
from moesaic.sparse.score import Linear, Oracle
from moesaic.sparse.select import AllBlocks, Threshold, TopK
from moesaic.sparse.trace import count_routing, record_routing
from moesaic.training.fit import FitConfig

FIT = FitConfig(steps=8, batch_size=4, lr=1e-2)
NUM_BLOCKS = 8


def method(scale: str = "count", score=None, **changes) -> SparseMethod:
    settings = {
        "name": "llama_moe",
        "partition": Random(num_blocks=NUM_BLOCKS),
        "score": score or Noisy(activation="softmax"),
        "select": TopK(k=2),
        "combine": Combine(weight="renormalised", scale=scale),
        "oracle": Oracle(target="output_norm", activation="sigmoid"),
        "adapt_each_budget": True,
        "calibration_tokens": 512,
    }
    return SparseMethod(**{**settings, **changes})


def equal_logits(scale: str) -> SparseMethod:
    return method(scale, Noisy(router="linear", activation="softmax"))


def token_weights(model, k: int, always: int = 0) -> Tensor:
    """(T, B) weights of the first layer in evaluation."""
    select_blocks(model, TopK(k=k, always=always))
    with record_routing(model) as trace, torch.no_grad():
        model(ids_NC())
    return trace.layers[0][0].routing.weight_TB()


@pytest.mark.parametrize(("scale", "total"), [("one", 1.0), ("count", 2.0), ("ratio", 4.0), ("total", 8.0)])
def test_the_weights_of_the_selected_blocks_sum_to_s(tmp_path, scale, total):
    _, trained, _ = toy_conversion(method(scale), tmp_path / "random")
    torch.testing.assert_close(token_weights(trained, 2).sum(1), torch.full((64,), total))
    _, fresh, _ = toy_conversion(equal_logits(scale), tmp_path / "equal")
    weight_TB = token_weights(fresh, 2)
    torch.testing.assert_close(weight_TB[weight_TB != 0], torch.full((128,), total / 2))


def test_evaluation_is_deterministic_and_training_is_not(tmp_path):
    _, model, _ = toy_conversion(method(), tmp_path)
    select_blocks(model, TopK(k=2))
    assert torch.equal(model(ids_NC()).logits, model(ids_NC()).logits)
    with torch.random.fork_rng():
        model.train()
        assert not torch.equal(model(ids_NC()).logits, model(ids_NC()).logits)


def test_with_all_blocks_and_equal_logits_s_k_is_dense_and_the_published_mean_is_not(tmp_path):
    for scale, factor in (("count", 1.0), ("ratio", 1 / NUM_BLOCKS)):
        dense, model, calibration = toy_conversion(equal_logits(scale), tmp_path / scale)
        select_blocks(model, TopK(k=NUM_BLOCKS))
        x_TD = calibration.inputs_TD(0)[:20]
        ffn = dense.model.layers[0].mlp
        torch.testing.assert_close(model.model.layers[0].mlp(x_TD), factor * ffn(x_TD), atol=1e-6, rtol=1e-4)


def test_the_all_blocks_control_is_the_dense_model_whatever_the_scale(tmp_path):
    chosen = method("ratio")
    dense, model, calibration = toy_conversion(chosen, tmp_path)
    apply_arm(model, "all_blocks", chosen, 2, calibration, 0)
    torch.testing.assert_close(model(ids_NC()).logits, dense(ids_NC()).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("k", "learns"), [(1, False), (2, True)])
def test_the_router_learns_from_the_task_only_where_two_blocks_share_the_weight(tmp_path, k, learns):
    _, model, _ = toy_conversion(method(), tmp_path)
    select_blocks(model, TopK(k=k))
    task_loss(model, {"input_ids": ids_NC()}).backward()
    largest = max(p.grad.abs().max().item() for layer in sparse_layers(model) for p in layer.score.router.parameters())
    # A softmax over one logit is 1: what is left is rounding.
    assert (largest > 1e-4) == learns
    assert learns or largest < 1e-7


def test_everything_is_trained_and_the_task_is_learned(tmp_path):
    _, model, calibration = toy_conversion(method(), tmp_path)
    select_blocks(model, TopK(k=2))
    before, batch = weights(model), {"input_ids": ids_NC()}
    loss = task_loss(model, batch).item()
    facts = BalancedFinetune(fit=FIT).run(toy_job(model, calibration, tmp_path / "fit"))
    assert task_loss(model, batch).item() < loss
    kept = {name for name, value in weights(model).items() if torch.equal(value, before[name])}
    assert kept == {f"model.layers.{layer}.mlp.experts.neuron_F" for layer in range(2)}  # where each neuron came from
    assert facts["tokens"] == 8 * 4 * 16


@pytest.mark.parametrize("noise", [True, False])
def test_balance_is_importance_plus_load_and_importance_alone_without_noise(tmp_path, noise):
    _, model, _ = toy_conversion(method(score=Noisy(activation="softmax", noise=noise)), tmp_path)
    layer = sparse_layers(model)[0].train()
    layer.select = TopK(k=2)
    x_TD = torch.randn(200, layer.experts.dim, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(), record_routing(model) as trace:
        torch.manual_seed(0)
        layer(x_TD)
    noisy_TB, active_TB = trace.layers[0][0].logits_TB, trace.layers[0][0].routing.active_TB()
    expected = squared_variation(noisy_TB.masked_fill(~active_TB, -torch.inf).softmax(1).sum(0))
    if noise:
        clean_TB = layer.score.router(x_TD, layer.experts)
        expected = expected + squared_variation(load(clean_TB, noisy_TB - clean_TB, layer.score.noise_std(x_TD), 2))
    torch.testing.assert_close(balance_loss(layer, x_TD, noisy_TB, active_TB, False), expected)
    released = balance_loss(layer, x_TD, noisy_TB, active_TB, True)
    assert torch.equal(released, expected) != noise


def test_balance_of_a_collapsed_router_is_at_its_maximum_and_always_on_blocks_do_not_count(tmp_path):
    _, model, _ = toy_conversion(equal_logits("count"), tmp_path)
    layer = sparse_layers(model)[0]
    layer.select = TopK(k=1)
    logits_TB = torch.zeros(50, NUM_BLOCKS)
    logits_TB[:, 3] = 1000.0
    x_TD, active_TB = torch.zeros(50, layer.experts.dim), TopK(k=1)(logits_TB).active_TB()
    layer.score.noise_DB = None
    assert balance_loss(layer, x_TD, logits_TB, active_TB, False).item() == pytest.approx(NUM_BLOCKS)
    layer.select = TopK(k=3, always=2)
    active_TB = layer.select(logits_TB).active_TB()
    assert balance_loss(layer, x_TD, logits_TB, active_TB, False).item() == pytest.approx(NUM_BLOCKS - 2)


@pytest.mark.parametrize("always", [0, 2])
def test_a_budget_without_routed_blocks_trains_and_has_nothing_to_balance(tmp_path, always):
    _, model, _ = toy_conversion(method(), tmp_path)
    select_blocks(model, TopK(k=always, always=always))
    step = BalancedTraining(model.train(), [], BalancedFinetune(fit=FIT)).training_step({"input_ids": ids_NC()}, 0)
    assert torch.equal(step["loss"], step["task_loss"])
    step["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_balance_training_spreads_a_router_that_prefers_one_block(tmp_path):
    uneven = {}
    for weight in (0.0, 1.0):
        _, model, calibration = toy_conversion(equal_logits("count"), tmp_path / str(weight))
        for index, layer in enumerate(sparse_layers(model)):
            mean_D = calibration.inputs_TD(index).mean(0)
            with torch.no_grad():
                layer.score.router.weight_BD[0] = 2 * mean_D / mean_D.square().sum()
        select_blocks(model, TopK(k=2))
        fit = FitConfig(steps=40, batch_size=8, lr=2e-2)
        phase = BalancedFinetune(fit=fit, balance_weight=weight, train=("router",))
        phase.run(toy_job(model, calibration, tmp_path / str(weight) / "fit"))
        with count_routing(model) as counts, torch.no_grad():
            model(ids_NC(64))
        uneven[weight] = sum(squared_variation(counts_B).item() for counts_B in counts.counts_LB())
    assert uneven[1.0] < 0.5 * uneven[0.0]


def test_always_on_blocks_are_in_every_tokens_routing(tmp_path):
    _, model, _ = toy_conversion(method(), tmp_path)
    weight_TB = token_weights(model, 3, always=2)
    assert (weight_TB[:, :2] > 0).all()
    assert ((weight_TB > 0).sum(1) == 3).all()


def test_the_activity_term_is_the_mean_score_and_serves_a_threshold(tmp_path):
    sigmoid = method(
        score=Linear(activation="sigmoid"),
        select=Threshold(tau=0.5),
        combine=Combine(straight_through="dense", scale="ratio"),
    )
    _, model, calibration = toy_conversion(sigmoid, tmp_path)
    select_blocks(model, Threshold(tau=0.5))
    phase = BalancedFinetune(fit=FIT, balance_weight=0.0, activity_weight=3.0)
    model.train()
    with record_routing(model) as trace:
        step = BalancedTraining(model, [], phase).training_step({"input_ids": ids_NC()}, 0)
    expected = 3.0 * sum(records[0].score_TB.mean() for records in trace.layers)
    torch.testing.assert_close(step["loss"] - step["task_loss"], expected)
    active = {}
    for weight in (0.0, 30.0):
        _, model, calibration = toy_conversion(sigmoid, tmp_path / str(weight))
        select_blocks(model, Threshold(tau=0.5))
        chosen = BalancedFinetune(fit=FIT, balance_weight=0.0, activity_weight=weight)
        chosen.run(toy_job(model, calibration, tmp_path / str(weight) / "fit"))
        with count_routing(model) as counts, torch.no_grad():
            model(ids_NC())
        active[weight] = sum(counts.active_frac_L())
    assert active[30.0] < active[0.0]


@pytest.mark.parametrize("select", [Threshold(tau=0.5), AllBlocks()])
def test_balance_without_a_fixed_k_is_refused(tmp_path, select):
    _, model, calibration = toy_conversion(method(), tmp_path)
    select_blocks(model, select)
    with pytest.raises(ValueError, match=rf"balance_weight=0.01.*is {type(select).__name__}.*Set balance_weight: 0"):
        BalancedFinetune(fit=FIT).run(toy_job(model, calibration, tmp_path / "fit"))


def gradient_method(always: int = 0) -> LlamaMoE:
    settings = {field.name: getattr(method(), field.name) for field in fields(SparseMethod)}
    partition = Gradient(num_blocks=NUM_BLOCKS, always=always)
    return LlamaMoE(**{**settings, "partition": partition, "select": TopK(k=3, always=always)})


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_split_by_gradient_is_the_dense_model_and_differs_between_layers(tmp_path, family):
    dense, model, _ = toy_conversion(gradient_method(2), tmp_path, family=family)
    apply_arm(model, "all_blocks", gradient_method(2), 3, None, 0)
    torch.testing.assert_close(model(ids_NC()).logits, dense(ids_NC()).logits, atol=1e-5, rtol=1e-4)
    first, second = (layer.experts.neuron_F for layer in sparse_layers(model))
    assert not torch.equal(first, second)


def test_other_splits_are_those_of_every_sparse_method(tmp_path):
    settings = {field.name: getattr(method(), field.name) for field in fields(SparseMethod)}
    _, own, _ = toy_conversion(LlamaMoE(**settings), tmp_path / "own")
    _, plain, _ = toy_conversion(method(), tmp_path / "plain")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in weights(own).items())
