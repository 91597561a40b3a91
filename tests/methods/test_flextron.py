"""Flextron's phases: what they train, what they must leave alone, and that budgets are met."""

import json
from functools import partial

import pytest
import torch
from methods.toy import ids_NC, toy_conversion, toy_job, weights
from torch import Tensor

from moesaic.app.compose import compose_plain
from moesaic.app.schema import MoesaicConfig
from moesaic.bench.level_latency import measure_levels
from moesaic.config.errors import ConfigError
from moesaic.config.strict import strict_object, to_plain
from moesaic.methods.base import SparseMethod, select_blocks
from moesaic.methods.elastic import CostTarget, LevelSampling, StaticRouter, step_generator
from moesaic.methods.flextron import (
    ElasticWidths,
    JointObjective,
    JointTraining,
    RandomWidths,
    SurrogateObjective,
    SurrogateRouting,
    distillation_loss,
)
from moesaic.methods.lm import task_loss, train_only
from moesaic.sparse.combine import Combine
from moesaic.sparse.elastic import BudgetedLevelMLP, StaticLevels, TokenLevels
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.levels import RandomLevels
from moesaic.sparse.partition import Importance
from moesaic.sparse.select import AllBlocks, TopK
from moesaic.sparse.similarity import SimilarityOracle
from moesaic.sparse.trace import count_routing
from moesaic.training.fit import FitConfig, part_of

FIT = FitConfig(steps=30, batch_size=4, lr=1e-3)
TRAINED = (0.25, 0.5, 1.0)
COST = CostTarget(gap="relative")
BATCH = {"input_ids": ids_NC()}


def method(mode: str = "static") -> SparseMethod:
    common = {"levels": "geometric", "budget": 0.5, "trained_budgets": TRAINED}
    token = BudgetedLevelMLP(trained_budgets=TRAINED, levels="geometric", hidden=8)
    return SparseMethod(
        name="flextron",
        partition=Importance(num_blocks=4),
        score=None if mode == "static" else token,
        select=StaticLevels(**common, hidden=16) if mode == "static" else TokenLevels(**common),
        combine=Combine(),
        oracle=SimilarityOracle(similarity="rel_mse", levels="geometric"),
        random=RandomLevels(levels="geometric"),
        adapt_each_budget=False,
        calibration_tokens=512,
    )


def job_of(folder, mode: str = "static"):
    _, model, calibration = toy_conversion(method(mode), folder)
    select_blocks(model, method(mode).select)
    return toy_job(model, calibration, folder / "fit")


def joint(**changes) -> JointTraining:
    return JointTraining(**{"fit": FIT, "router_lr": 1e-2, "cost": COST, "full_every": 3, **changes})


def joint_module(job, **changes) -> JointObjective:
    phase = joint(**changes)
    return JointObjective(job, phase, train_only(job.model, phase.train, job.pattern), phase.fit, None)


def surrogate_module(job, **changes) -> SurrogateObjective:
    job.model.requires_grad_(False)
    return SurrogateObjective(job, SurrogateRouting(fit=FIT, router_lr=1e-2, cost=COST, **changes), FIT)


def router_weights(model) -> dict[str, Tensor]:
    return {name: value for name, value in weights(model).items() if "select_state" in name or ".score." in name}


def share_at(model, budget: float) -> float:
    for layer in sparse_layers(model):
        layer.select = layer.select.with_budget(budget)
    with count_routing(model) as counts, torch.no_grad():
        model(**BATCH)
    return sum(counts.active_frac_L()) / len(counts.active_frac_L())


@pytest.mark.parametrize("mode", ["static", "token"])
def test_a_trained_router_spends_more_when_more_is_asked_for(tmp_path, mode):
    job = job_of(tmp_path, mode)
    facts = joint(fit=FitConfig(steps=150, batch_size=4, lr=1e-3)).run(job)
    assert facts["steps"] == 150
    assert facts["tokens"] == 150 * 4 * 16
    shares = [share_at(job.model, budget) for budget in TRAINED]
    assert shares == pytest.approx(list(TRAINED), abs=0.13)  # one level of one of the two layers is 0.125
    if mode == "static":
        widths = {row["budget"]: row for row in facts["widths"]}
        assert [row["trained"] for row in facts["widths"]] == [True, False, True, False, True]
        for budget, share in zip(TRAINED, shares, strict=True):
            assert widths[budget]["cost_frac"] == pytest.approx(share)
            assert sum(widths[budget]["blocks_L"]) / 8 == pytest.approx(share)


@pytest.mark.parametrize("mode", ["static", "token"])
def test_only_what_is_named_is_trained(tmp_path, mode):
    job = job_of(tmp_path, mode)
    before = weights(job.model)
    joint(train=("ffn",)).run(job)
    changed = {name for name, value in weights(job.model).items() if not torch.equal(value, before[name])}
    routers = "select_state" if mode == "static" else ".score."
    assert any(routers in name for name in changed)
    assert any(".experts." in name for name in changed)
    assert all(routers in name or ".experts." in name for name in changed)


def test_the_full_model_takes_every_third_step_or_a_random_third(tmp_path):
    module = joint_module(job_of(tmp_path))
    steps = range(300)
    module.__class__ = type("At", (JointObjective,), {"global_step": property(lambda self: self.at)})

    def full_steps() -> list[int]:
        full = []
        for step in steps:
            module.at = step
            full += [step] if module.is_full_step() else []
        return full

    assert full_steps() == list(range(2, 300, 3))
    module.phase = joint(full_every=None, full_prob=0.33)
    drawn = full_steps()
    assert 70 < len(drawn) < 130
    assert drawn == full_steps()
    budgets = set()
    for module.at in steps:
        budgets.add(module.drawn_budget())
    assert budgets == set(TRAINED)


def test_the_first_way_of_mixing_holds_until_the_switch(tmp_path):
    module = joint_module(job_of(tmp_path), mix_switch=0.7)
    module.__class__ = type("At", (JointObjective,), {"global_step": property(lambda self: self.at)})
    mixes = []
    for module.at in range(30):
        mixes.append(module.mix())
    assert mixes == ["soft"] * 21 + ["straight_through"] * 9
    module.sampling = LevelSampling(hard_prob=1.0)
    assert module.mix() == "hard_prob"


@pytest.mark.parametrize("mode", ["static", "token"])
def test_probabilities_repeat_and_carry_the_loss_gradient_to_the_router(tmp_path, mode):
    job = job_of(tmp_path, mode)
    module = joint_module(job)
    for mix in ("soft", "straight_through", "hard_prob"):
        loss, prob_LE = module.mixed(BATCH, 0.5, mix, partial(task_loss, job.model))
        again, prob_again_LE = module.mixed(BATCH, 0.5, mix, partial(task_loss, job.model))
        assert torch.equal(prob_LE, prob_again_LE)
        assert torch.equal(loss, again)
        torch.testing.assert_close(prob_LE.sum(dim=1), torch.ones(2))
        gradients = torch.autograd.grad(loss, module.router_group()["params"], allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients)


def test_straight_through_has_the_loss_of_the_hard_slices(tmp_path):
    job = job_of(tmp_path)
    module = joint_module(job)
    loss, prob_LE = module.mixed(BATCH, 0.5, "straight_through", partial(task_loss, job.model))
    module.router.out_LEU.data.copy_(torch.stack([torch.zeros_like(w) for w in module.router.out_LEU]))
    for layer, level in zip(module.layers, prob_LE.argmax(dim=1).tolist(), strict=True):
        layer.select = TopK(k=1)  # drop the mixture first
        layer.select = method().select
        out_EU = torch.zeros(3, 16)
        out_EU[level] = 1.0
        layer.select_state.fill(torch.ones(16, 3), out_EU)
        assert layer.static_blocks == (1, 2, 4)[level]
    torch.testing.assert_close(loss, task_loss(job.model, BATCH))


def test_the_gap_by_hand():
    prob_LE = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    cost = torch.tensor(0.6)
    assert CostTarget(gap="relative").loss(cost, 0.5, prob_LE).item() == pytest.approx(0.2)
    assert CostTarget(gap="absolute", weight=3.0).loss(cost, 0.5, prob_LE).item() == pytest.approx(0.3)
    dead = CostTarget(gap="relative", dead_band=0.05, full_weight=10.0)
    assert dead.loss(torch.tensor(0.52), 0.5, prob_LE) == 0
    assert dead.loss(torch.tensor(0.53), 0.5, prob_LE).item() == pytest.approx(0.06)
    # The full budget has no dead band, and pulls the probabilities to the last level: mean of (0.25 + 0.25) / 6.
    assert dead.loss(torch.tensor(0.98), 1.0, prob_LE).item() == pytest.approx(0.02 + 10 * 0.5 / 6)


def test_sampling_cools_and_sharpens_over_the_steps():
    sampling, logits_XE = LevelSampling(tau_decay=0.9), torch.tensor([[0.0, 0.3, 0.1]]).repeat(500, 1)
    early, late = (sampling.probabilities(logits_XE, step, 50, step_generator(0, 0)) for step in (0, 49))
    assert late.amax(dim=1).mean() > 0.98 > 0.8 > early.amax(dim=1).mean()
    # Ten times the logits: the middle level wins more often than by softmax of the plain ones.
    assert (late.argmax(dim=1) == 1).float().mean() > (early.argmax(dim=1) == 1).float().mean() + 0.2
    assert torch.equal(early, sampling.probabilities(logits_XE, 0, 50, step_generator(0, 0)))


def test_p1_trains_the_mean_loss_of_full_and_random_widths_and_no_router(tmp_path):
    job = job_of(tmp_path)
    phase = ElasticWidths(fit=FIT, num_random=2)
    module = RandomWidths(job, phase, [], FIT)
    loss = module.training_step(BATCH, 0)["loss"]
    generator, expected = step_generator(job.seed, 0), []
    for widths in ([AllBlocks()] * 2, module.random_widths(generator), module.random_widths(generator)):
        for layer, width in zip(sparse_layers(job.model), widths, strict=True):
            layer.select = width
        expected.append(task_loss(job.model, BATCH))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    drawn = [width.k for _ in range(200) for width in module.random_widths(generator)]
    assert {1, 2, 4} == set(drawn)

    job = job_of(tmp_path / "run")
    before = weights(job.model)
    facts = phase.run(job)
    assert facts["passes_per_token"] == 3
    assert facts["tokens"] == 30 * 4 * 16
    after = weights(job.model)
    assert all(not layer.select_state.trained for layer in sparse_layers(job.model))
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert share_at(job.model, 0.25) == 1.0


@pytest.mark.parametrize("mode", ["static", "token"])
def test_p2_never_changes_the_backbone_and_waits_for_the_surrogate(tmp_path, mode):
    shut = job_of(tmp_path / "shut", mode)
    before = weights(shut.model)
    closed = SurrogateRouting(fit=FIT, router_lr=1e-2, cost=COST, surrogate_gate=0.0)
    facts = closed.run(shut)
    assert facts["tokens"] == 0
    assert facts["router_tokens"] == 30 * 4 * 16
    start = router_weights(shut.model)
    if mode == "static":
        fresh = StaticRouter.of(sparse_layers(job_of(tmp_path / "fresh").model), seed=shut.seed)
        assert all(torch.equal(layer.select_state.in_UK, fresh.in_UK) for layer in sparse_layers(shut.model))
    else:
        assert all(torch.equal(value, before[name]) for name, value in start.items())

    wide = job_of(tmp_path / "open", mode)
    SurrogateRouting(fit=FIT, router_lr=1e-2, cost=COST, surrogate_gate=1e9).run(wide)
    assert any(not torch.equal(value, start[name]) for name, value in router_weights(wide.model).items())
    for model in (shut.model, wide.model):
        for name, value in weights(model).items():
            assert torch.equal(value, before[name]) or name in start


def test_p2_reaches_the_router_only_through_the_surrogate(tmp_path):
    module = surrogate_module(job_of(tmp_path), surrogate_gate=1e9)
    loss = module.training_step(BATCH, 0)["loss"]
    own = list(module.surrogate.parameters())
    gradients = torch.autograd.grad(loss, [*module.router.parameters(), *own], retain_graph=True)
    assert all(g.abs().sum() > 0 for g in gradients[:2])
    # With a surrogate that predicts a constant and no price, nothing is left that could move the router.
    with torch.no_grad():
        module.surrogate[-1].weight.zero_()
    module.cost = CostTarget(gap="relative", weight=0.0)
    loss = module.training_step(BATCH, 0)["loss"]
    gradients = torch.autograd.grad(loss, list(module.router.parameters()))
    assert all(g.abs().sum() == 0 for g in gradients)


def test_the_surrogates_own_gradient_is_that_of_its_error_alone(tmp_path):
    job = job_of(tmp_path)
    gradients = []
    for gate in (0.0, 1e9):
        module = surrogate_module(job, surrogate_gate=gate)
        module.offset.fill_(3.0)
        loss = module.training_step(BATCH, 0)["loss"]
        gradients.append(torch.autograd.grad(loss, list(module.surrogate.parameters())))
        for layer in sparse_layers(job.model):
            layer.select = method().select
    for shut, wide in zip(*gradients, strict=True):
        torch.testing.assert_close(shut, wide)


@pytest.mark.parametrize("kind", ["joint", "surrogate"])
def test_an_interrupted_fit_goes_on_exactly(tmp_path, kind, monkeypatch):
    fit = FitConfig(steps=12, batch_size=4, lr=1e-3, checkpoint_every_steps=5)
    phase = joint(fit=fit) if kind == "joint" else SurrogateRouting(fit=fit, router_lr=1e-2, cost=COST)
    objective = JointObjective if kind == "joint" else SurrogateObjective
    whole = job_of(tmp_path / "whole")
    facts = phase.run(whole)

    plain = objective.training_step

    def dies(self, batch, number):
        if self.global_step == 8:
            raise ConnectionError("gone")
        return plain(self, batch, number)

    cut = job_of(tmp_path / "cut")
    monkeypatch.setattr(objective, "training_step", dies)
    with pytest.raises(ConnectionError):
        phase.run(cut)
    monkeypatch.setattr(objective, "training_step", plain)
    again = job_of(tmp_path / "again")
    again.folder = cut.folder
    resumed = phase.run(again)
    assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(again.model).items())
    assert resumed["widths"] == facts["widths"]


def test_distillation_is_the_forward_kl_and_nothing_at_the_start(tmp_path):
    dense, model, _ = toy_conversion(method(), tmp_path)
    assert distillation_loss(model, dense, BATCH).item() == pytest.approx(0, abs=1e-6)
    select_blocks(model, TopK(k=2))
    for layer in sparse_layers(model):
        layer.select = AllBlocks()
        layer.experts.down_BSD.data.mul_(0.5)
    wanted, own = dense(**BATCH).logits.softmax(-1), model(**BATCH).logits.softmax(-1)
    by_hand = (wanted * (wanted / own).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(model, dense, BATCH), by_hand, atol=1e-6, rtol=1e-4)


def test_a_distilled_run_never_moves_its_parent(tmp_path):
    job = job_of(tmp_path)
    facts = joint(distill="frozen_parent").run(job)
    assert facts["final_loss"] < 1.0  # a divergence from the start, and not the text's loss of about 4 nats


def test_costs_may_be_measured_time(tmp_path):
    table = measure_levels(dim=16, width=48, num_blocks=4, blocks_X=(1, 2, 4), num_layers=2, tokens=16, rounds=5)
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(to_plain(table)))
    job = job_of(tmp_path)
    cost = CostTarget(gap="relative", latency_table=path)
    cost_LE = cost.cost_LE(sparse_layers(job.model), method().select)
    torch.testing.assert_close(cost_LE, torch.tensor([[ms / table.ms_X[-1] for ms in table.ms_X]] * 2))
    facts = joint(cost=cost).run(job)
    for row in facts["widths"]:
        shares = [dict(zip(table.blocks_X, table.ms_X, strict=True))[k] / table.ms_X[-1] for k in row["blocks_L"]]
        assert row["cost_frac"] == pytest.approx(sum(shares) / 2, rel=1e-5)


def test_another_table_is_another_stage_and_a_missing_one_is_refused(tmp_path):
    path = tmp_path / "latency.json"
    times = {"blocks_X": [1, 2, 4], "num_blocks": 4, "dim": 16, "width": 48, "tokens": 1, "dtype": "float32"}
    contents = []
    for full in (2.0, 3.0):
        path.write_text(json.dumps({**times, "ms_X": [0.5, 1.0, full], "threads": 1, "device": "cpu"}))
        contents.append(joint(cost=CostTarget(gap="relative", latency_table=path)).content())
    assert contents[0] != contents[1]
    assert joint().content() is None
    with pytest.raises(ConfigError, match=r"missing\.json cannot be read"):
        joint(cost=CostTarget(gap="relative", latency_table=tmp_path / "missing.json")).content()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": ()}, "one way of mixing, or two"),
        ({"mix_switch": 1.5}, r"mix_switch=1\.5"),
        ({"full_every": 1}, "full_every=1 must be at least 2"),
        ({"full_every": 3, "full_prob": 0.5}, r"excludes full_prob=0\.5"),
        ({"router_lr": 0.0}, "router_lr"),
        ({"span_frac": (0.5, 0.5)}, "holds no step"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        joint(**changes)


def test_a_model_that_knows_no_budget_is_refused(tmp_path):
    job = job_of(tmp_path)
    select_blocks(job.model, TopK(k=2))
    with pytest.raises(ValueError, match=r"method\.select must be .*StaticLevels or TokenLevels"):
        joint().run(job)


@pytest.mark.parametrize("mode", ["static", "token"])
@pytest.mark.parametrize("variant", ["as_published", "as_released", "corrected"])
def test_every_variant_takes_the_steps_of_one_fit_in_the_order_of_the_page(variant, mode):
    overrides = ["method=flextron", f"method.variant={variant}", f"method/mode={mode}"]
    config = strict_object(MoesaicConfig, compose_plain(overrides))
    phases = config.method.active_phases()
    names = [name for name, _ in phases]
    assert names == (["elastic", "surrogate", "joint"] if variant == "as_published" else ["joint"])
    parts = [part_of(phase.fit, phase.span_frac) for _, phase in phases]
    assert sum(fit.steps for fit, _ in parts) == config.adapt.fit.steps
    assert [begin for _, begin in parts] == [sum(fit.steps for fit, _ in parts[:i]) for i in range(len(parts))]
    assert isinstance(config.method.select, StaticLevels if mode == "static" else TokenLevels)
    assert (config.method.score is None) == (mode == "static")
