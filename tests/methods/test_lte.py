"""LTE: losses against closed forms, the eta dial, what each phase may change, and the paper's cost arithmetic."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from methods.toy import ids_NC, toy_conversion, toy_job, weights
from torch import Tensor, nn
from toy_ffns import block_outputs, random_experts, random_ffn, random_inputs
from transformers import AutoModelForCausalLM, LlamaConfig

from moesaic.bench.anatomy import read_anatomy
from moesaic.methods.base import AdaptJob, SparseMethod, select_blocks
from moesaic.methods.lm import FinetuneLM, LanguageModelling
from moesaic.methods.lte import (
    SoftObjective,
    SoftTraining,
    efficiency_loss,
    observed_scores,
    separability_loss,
    soft_routing,
)
from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.partition import BalancedKMeans
from moesaic.sparse.score import Linear, Oracle, RandomScore, Score
from moesaic.sparse.select import AllBlocks, Threshold, TopK
from moesaic.sparse.trace import record_routing
from moesaic.training.fit import FitConfig

FIT = FitConfig(steps=20, batch_size=4, lr=1e-3, warmup_steps=2)
HARD = Threshold(tau=0.5)
SCORE = Linear(bias=False, activation="sigmoid", init="zero")


def method(score: Score = SCORE) -> SparseMethod:
    return SparseMethod(
        name="lte",
        partition=BalancedKMeans(num_blocks=8),
        score=score,
        select=HARD,
        combine=Combine(fill="bias"),
        oracle=Oracle(target="output_norm"),
        adapt_each_budget=False,
        calibration_tokens=512,
    )


def soft(**changes) -> SoftTraining:
    settings = {
        "fit": FIT,
        "eta": 0.5,
        "separability_weight": 0.5,
        "epsilon": 0.01,
        "router_lr": 0.01,
        "router_weight_decay": 0.1,
        "span_frac": (0.0, 0.6),
    }
    return SoftTraining(**{**settings, **changes})


def hard(**changes) -> FinetuneLM:
    return FinetuneLM(**{"fit": FIT, "span_frac": (0.6, 1.0), **changes})


def converted(folder, *, family: str = "llama", score: Score = SCORE) -> AdaptJob:
    _, model, calibration = toy_conversion(method(score), folder, family=family)
    select_blocks(model, HARD)
    return toy_job(model, calibration, folder / "fit")


def layer_of(*, bias: bool, gated: bool = True, score: Score = SCORE) -> SparseFFN:
    experts = random_experts(random_ffn(gated=gated, bias=bias), 6)
    built = score.build(experts.dim, 6)
    built.initialise(experts, None, generator=torch.Generator().manual_seed(0))
    return SparseFFN(experts, built, HARD, Combine(fill="bias").build(experts.dim, 6))


def slope(loss_of, score: float) -> float:
    """d loss / d score of a single score."""
    score_TB = torch.tensor([[score]], requires_grad=True)
    loss_of(score_TB).backward()
    return score_TB.grad.item()


# Routers that start at zero: every score is 0.5.


@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)])
def test_at_the_start_the_soft_output_is_half_the_dense_one_plus_the_whole_bias(gated, bias):
    layer, x_TD = layer_of(gated=gated, bias=bias), random_inputs(9)
    bias_D = layer.experts.down_bias_D if bias else torch.zeros(8)
    dense_TD = layer.experts.dense_ffn()(x_TD) - bias_D
    with soft_routing(layer):
        torch.testing.assert_close(layer(x_TD) - bias_D, 0.5 * dense_TD)
        with observed_scores(layer) as scores:
            layer(x_TD)
    assert efficiency_loss(scores[0]).item() == 0.25
    assert separability_loss(scores[0], 0.5, 0.01).item() == pytest.approx(100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_score_of_exactly_one_half_runs_nothing_and_leaves_the_bias(dtype):
    layer = layer_of(bias=True).to(dtype)
    x_TD = random_inputs(5).to(dtype)
    assert layer.route(x_TD)[0].token_N.numel() == 0
    assert torch.equal(layer(x_TD), layer.experts.down_bias_D.expand(5, -1))


# Hard gates.


def test_routers_that_want_everything_give_the_dense_ffn_and_those_that_want_nothing_its_bias():
    layer, x_TD = layer_of(bias=True), random_inputs(9).abs()
    with torch.no_grad():
        layer.score.weight_BD.fill_(0.1)
        torch.testing.assert_close(layer(x_TD), layer.experts.dense_ffn()(x_TD))
        layer.score.weight_BD.fill_(-0.1)
        assert torch.equal(layer(x_TD), layer.experts.down_bias_D.expand(9, -1))


@pytest.mark.parametrize("executor", ["masked", "loop", "grouped", "gather"])
def test_executors_agree_on_floating_numbers_of_blocks(executor):
    layer = layer_of(bias=True, score=replace(SCORE, init="uniform"))
    layer.executor = executor
    x_TD = torch.cat([random_inputs(40), torch.zeros(1, 8)])
    logits_TB = layer.score(x_TD, layer.experts)
    active_TB = logits_TB.detach() > 0
    assert active_TB.sum(1).unique().numel() > 3
    expected_TD = (block_outputs(layer.experts, x_TD) * active_TB[:, :, None]).sum(1)
    torch.testing.assert_close(layer(x_TD), (expected_TD + layer.experts.down_bias_D).float())
    with record_routing(layer) as trace:
        layer(x_TD)
    assert trace.active_frac_L() == [pytest.approx(active_TB.float().mean().item())]


# The losses.


@pytest.mark.parametrize(
    ("score", "without", "with_epsilon"), [(0.75, -64, -47.56), (0.99, -8.50, -7.83), (1.0, -8, -7.40)]
)
def test_gradient_of_the_separability_loss_per_score(score, without, with_epsilon):
    assert slope(lambda s: 0.5 * separability_loss(s, 0.5, 0.0), score) == pytest.approx(without, abs=5e-3)
    assert slope(lambda s: 0.5 * separability_loss(s, 0.5, 0.01), score) == pytest.approx(with_epsilon, abs=5e-3)


def test_the_separability_gradient_is_odd_and_steepest_at_the_root_of_a_third_of_epsilon():
    def force(score: float) -> float:
        return slope(lambda s: 0.5 * separability_loss(s, 0.5, 0.01), score)

    assert force(0.5) == 0
    steepest = math.sqrt(0.01 / 3)
    for distance in (0.02, steepest, 0.3):
        assert force(0.5 + distance) == pytest.approx(-force(0.5 - distance), rel=1e-4)
        assert abs(force(0.5 + distance)) <= 324.8
    assert abs(force(0.5 + steepest)) == pytest.approx(324.8, abs=0.05)


def test_the_efficiency_gradient_is_twice_the_score():
    assert slope(lambda s: 0.7 * efficiency_loss(s), 0.3) == pytest.approx(2 * 0.7 * 0.3)


def test_without_epsilon_a_score_above_one_half_is_lowered_only_by_a_high_eta():
    # Minus the slope is where the score goes; at 1 the wall of the barrier pushes least.
    def pull(eta: float) -> float:
        return slope(lambda s: eta * efficiency_loss(s) + 0.5 * separability_loss(s, 0.5, 0.0), 1.0)

    assert pull(3.99) < 0 < pull(4.01)
    with pytest.warns(UserWarning, match=r"eta=3\.99 < 8 \* separability_weight=0\.5"):
        soft(eta=3.99, epsilon=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soft(eta=4.01, epsilon=0.0)


def test_padding_counts_in_neither_loss(tmp_path):
    job = converted(tmp_path, score=replace(SCORE, init="uniform"))
    phase = soft()
    module = SoftObjective(job, phase, FIT)
    batch = {"input_ids": ids_NC(2), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
    batch["attention_mask"][1, 10:] = 0
    with soft_routing(job.model):
        with observed_scores(job.model) as scores:
            result = module.training_step(batch, 0)
    kept = [torch.cat([score_TB[:16], score_TB[16:26]]) for score_TB in scores.values()]
    efficiency = sum(score_TB.square().mean() for score_TB in kept) / len(kept)
    barrier = sum((1 / ((score_TB - 0.5) ** 2 + 0.01)).mean() for score_TB in kept) / len(kept)
    torch.testing.assert_close(result["loss"], result["task_loss"] + 0.5 * efficiency + 0.5 * barrier)
    above = sum((score_TB > 0.5).float().mean() for score_TB in kept) / len(kept)
    near = sum(((score_TB > 0.4) & (score_TB < 0.6)).float().mean() for score_TB in kept) / len(kept)
    assert result["active_frac"].item() == pytest.approx(above.item())
    assert result["near_frac"].item() == pytest.approx(near.item())
    assert 0 < near < 1


# The dial, on blocks with a known benefit and no model: what eta does depends on the start and on epsilon.


def sparsity_after_training(eta: float, *, init: str, epsilon: float) -> tuple[float, float]:
    """Share of blocks off, and the share of the whole benefit kept, after 400 steps."""
    generator = torch.Generator().manual_seed(0)
    dim, num_blocks = 128, 64
    mean_D = 0.5 * torch.randn(dim, generator=generator)
    value_DB = torch.randn(dim, num_blocks, generator=generator) * dim**-0.5
    size_B = torch.randn(num_blocks, generator=generator).exp()

    def draw() -> tuple[Tensor, Tensor]:
        x_TD = torch.randn(256, dim, generator=generator) + mean_D
        x_TD = x_TD / x_TD.square().mean(1, keepdim=True).sqrt()
        return x_TD, size_B * (x_TD @ value_DB).relu()

    experts = random_experts(random_ffn(dim=dim, width=num_blocks), num_blocks)
    router = replace(SCORE, init=init).build(dim, num_blocks)
    router.initialise(experts, None, generator=generator)
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(400):
        x_TD, benefit_TB = draw()
        score_TB = router.activate(router(x_TD, experts))
        loss = -(benefit_TB * score_TB).mean() + eta * efficiency_loss(score_TB)
        loss = loss + 0.5 * separability_loss(score_TB, 0.5, epsilon)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x_TD, benefit_TB = draw()
    active_TB = router.activate(router(x_TD, experts)) > 0.5
    kept = (benefit_TB * active_TB).sum() / benefit_TB.sum()
    return 1 - active_TB.float().mean().item(), kept.item()


def test_eta_dials_sparsity_when_routers_start_at_zero():
    points = [sparsity_after_training(eta, init="zero", epsilon=0.01) for eta in (0.1, 0.5, 1.0, 2.0)]
    sparsity = [point[0] for point in points]
    assert sparsity == sorted(sparsity)
    assert sparsity[-1] - sparsity[0] > 0.5
    # What is switched off is what is worth least: with two thirds off, three quarters of the benefit are left.
    assert sparsity[1] > 0.6
    assert points[1][1] > 0.75


def test_eta_dials_nothing_when_routers_start_on_either_side_of_the_barrier():
    points = [sparsity_after_training(eta, init="uniform", epsilon=0.0) for eta in (0.1, 0.5, 1.0, 2.0)]
    sparsity = [point[0] for point in points]
    assert max(sparsity) - min(sparsity) < 0.25
    # Zero-initialised routers keep more than that with fewer blocks: these are chosen by chance.
    assert max(kept for _, kept in points) < 0.7


# The phases.


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_phases_change_what_they_may_and_report_it(tmp_path, family):
    job = converted(tmp_path, family=family)
    before = weights(job.model)
    facts = soft().run(job)
    between = weights(job.model)
    changed = {name for name, value in between.items() if not torch.equal(value, before[name])}
    assert {".experts." in name or ".score." in name for name in changed} == {True}
    assert all(any(part in name for name in changed) for part in (".experts.", ".score."))
    assert {layer.select for layer in sparse_layers(job.model)} == {HARD}
    assert {layer.combine.config for layer in sparse_layers(job.model)} == {Combine(fill="bias")}
    assert (facts["steps"], facts["tokens"], facts["eta"]) == (12, 12 * 4 * 16, 0.5)
    assert all(sum(hist_X) == pytest.approx(1) for hist_X in facts["score_hist_frac_LX"])
    for off, hist_X in zip(facts["inactive_frac_L"], facts["score_hist_frac_LX"], strict=True):
        assert off == pytest.approx(sum(hist_X[:5]), abs=0.05)
    assert facts["soft_task_loss"] != facts["hard_task_loss"]
    assert facts["course"][-1]["step"] == 12
    assert json.loads(json.dumps(facts)) == facts

    after_hard = hard().run(replace(job, folder=tmp_path / "hard"))
    after = weights(job.model)
    changed = {name for name, value in after.items() if not torch.equal(value, between[name])}
    assert {".experts." in name for name in changed} == {True}
    assert facts["tokens"] + after_hard["tokens"] == 20 * 4 * 16


@pytest.mark.parametrize("train", [("ffn",), ("all",)])
def test_gradients_of_both_phases(tmp_path, train):
    job = converted(tmp_path, score=replace(SCORE, init="uniform"))
    batch = {"input_ids": ids_NC(4)}
    module = SoftObjective(job, soft(train=train), FIT)
    with soft_routing(job.model):
        module.training_step(batch, 0)["loss"].backward()
    outside = job.model.get_input_embeddings().weight
    assert (outside.grad is not None) == (train == ("all",))
    for layer in sparse_layers(job.model):
        assert layer.score.weight_BD.grad.any()
        assert all(weight.grad.any() for weight in layer.experts.parameters())

    job.model.zero_grad()
    LanguageModelling(job.model, list(job.model.parameters()), FIT).training_step(batch, 0).backward()
    assert all(layer.score.weight_BD.grad is None for layer in sparse_layers(job.model))


def test_training_the_whole_model_under_hard_gates_leaves_the_routers_bit_for_bit(tmp_path):
    job = converted(tmp_path, score=replace(SCORE, init="uniform"))
    before = weights(job.model)
    hard(train=("all",), fit=replace(FIT, weight_decay=0.1)).run(job)
    for name, value in weights(job.model).items():
        assert torch.equal(value, before[name]) == (".score." in name or "neuron_F" in name), name


def test_the_second_phase_goes_on_where_the_first_one_stopped(tmp_path, monkeypatch):
    seen: dict[str, list[list[int]]] = {}
    for kind in (SoftObjective, LanguageModelling):

        def note(module, batch, index, *, step=kind.training_step):
            seen.setdefault(type(module).__name__, []).extend(batch["input_ids"].tolist())
            return step(module, batch, index)

        monkeypatch.setattr(kind, "training_step", note)
    job = converted(tmp_path)
    soft().run(job)
    hard().run(replace(job, folder=tmp_path / "hard"))
    FinetuneLM(fit=FIT).run(toy_job(toy_conversion(method(), tmp_path)[0], None, tmp_path / "dense"))
    soft_rows, both = seen["SoftObjective"], seen["LanguageModelling"]
    assert (len(soft_rows), len(both)) == (48, 32 + 80)
    assert soft_rows + both[:32] == both[32:]


def test_routers_and_the_rest_are_clipped_apart_and_learn_at_their_own_rates(tmp_path):
    job = converted(tmp_path)
    module = SoftObjective(job, soft(), FIT)
    for parameter in module.routers:
        parameter.grad = torch.full_like(parameter, 1e3)
    for parameter in module.rest:
        parameter.grad = torch.full_like(parameter, 1e-6)
    module.configure_gradient_clipping(None, 1.0, "norm")
    assert nn.utils.get_total_norm([p.grad for p in module.routers]) == pytest.approx(1.0)
    assert all(p.grad.eq(1e-6).all() for p in module.rest)
    module.configure_gradient_clipping(None, None, None)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.0), (1e-2, 0.1)]
    assert [len(group["params"]) for group in groups] == [len(module.rest), len(module.routers)]
    same = SoftObjective(job, soft(router_lr=None), FIT).configure_optimizers()["optimizer"].param_groups
    assert same[1]["initial_lr"] == 1e-3


def test_a_fit_clips_by_group(tmp_path, monkeypatch):
    norms = []
    clip = SoftObjective.configure_gradient_clipping

    def note(module, *args, **kwargs):
        clip(module, *args, **kwargs)
        norms.extend(nn.utils.get_total_norm([p.grad for p in part]) for part in (module.rest, module.routers))

    monkeypatch.setattr(SoftObjective, "configure_gradient_clipping", note)
    soft(fit=replace(FIT, clip_norm=1e-3)).run(converted(tmp_path))
    assert len(norms) == 2 * 12
    torch.testing.assert_close(torch.stack(norms[2:]), torch.full((22,), 1e-3))


def test_released_routers_are_kept_in_bfloat16_while_they_train(tmp_path):
    job = converted(tmp_path)
    soft(router_dtype="bfloat16").run(job)
    for layer in sparse_layers(job.model):
        weight_BD = layer.score.weight_BD
        assert weight_BD.dtype == torch.float32
        assert weight_BD.any()
        assert torch.equal(weight_BD, weight_BD.bfloat16().float())
        assert not torch.equal(layer.experts.up_BSD, layer.experts.up_BSD.bfloat16().float())


def test_a_higher_price_switches_more_off_in_a_real_fit(tmp_path):
    off = []
    for eta in (0.0, 8.0):
        job = converted(tmp_path / str(eta), family="gpt2")
        with torch.no_grad():
            for block in job.model.transformer.h:
                block.ln_2.bias.add_(1.0)  # inputs with a mean: routers have no bias to lower all scores with
        off.append(soft(eta=eta, fit=replace(FIT, steps=60), span_frac=(0.0, 1.0)).run(job)["inactive_frac_L"])
    assert sum(off[1]) > sum(off[0]) + 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": -0.1}, r"eta=-0\.1 must not be negative"),
        ({"epsilon": -1.0}, r"epsilon=-1\.0 must not be negative"),
        ({"router_lr": 0.0}, r"router_lr=0\.0 must be positive; null takes fit\.lr=0\.001"),
        ({"span_frac": (0.5, 0.5)}, r"span_frac=\[0\.5, 0\.5\] holds no step of fit\.steps=20"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        soft(**changes)


def test_what_cannot_be_trained_is_refused(tmp_path):
    job = converted(tmp_path)
    with pytest.raises(ValueError, match=r"every score is 0\.5.*infinite.*score\.init=uniform"):
        soft(eta=9.0, epsilon=0.0).run(job)
    select_blocks(job.model, TopK(k=2))
    with pytest.raises(ValueError, match=r"method\.select must be moesaic\.sparse\.select\.Threshold"):
        soft().run(job)
    with pytest.raises(ValueError, match=r"method\.score has no parameters"):
        soft().run(converted(tmp_path / "random", score=RandomScore()))


# Table 1's unit and what it implies.


def test_table_1_in_its_own_unit():
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        dense = read_anatomy(AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=32000)))
    ffn, rest = sum(layer.num_blocks * layer.block_flops for layer in dense.ffns), 2 * dense.body.parameters
    unit = 2**30
    assert ffn + rest == 2 * 6_476_005_376
    assert (ffn + rest) / unit == pytest.approx(12.06, abs=5e-3)
    assert ffn / (ffn + rest) == pytest.approx(0.668, abs=5e-4)
    router = 32 * 2 * 4096 * 344
    assert router / ffn == pytest.approx(1 / 96)
    for price, without, with_router in ((5.38, 0.83, 0.84), (4.65, 0.92, 0.93), (6.59, 0.68, 0.69)):
        saved = ffn + rest - price * unit
        assert saved / ffn == pytest.approx(without, abs=5e-3)
        assert (saved + router) / ffn == pytest.approx(with_router, abs=5e-3)


def test_all_blocks_selected_after_conversion_is_the_dense_model(tmp_path):
    dense, model, _ = toy_conversion(method(), tmp_path, family="gpt2")
    assert {layer.select for layer in sparse_layers(model)} == {AllBlocks()}
    torch.testing.assert_close(model(ids_NC()).logits, dense(ids_NC()).logits, atol=1e-5, rtol=1e-4)
