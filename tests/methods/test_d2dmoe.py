"""D2DMoE: the penalty's spot values and limits, what it sees of each FFN, dynamic-k on the converted model."""

import math
from itertools import pairwise

import pytest
import torch
from methods.toy import ids_NC, toy_conversion, toy_job, weights
from safetensors.torch import save_file
from toys import tiny_model

from moesaic.ffn.sites import find_ffns
from moesaic.methods.base import SparseMethod, select_blocks
from moesaic.methods.d2dmoe import SparseTraining, Sparsify, alpha_at, l1, square_hoyer, visible_units
from moesaic.methods.lm import LanguageModelling, fit_language_model, train_only
from moesaic.methods.moefication import TrainRouters
from moesaic.methods.relufy import with_activation
from moesaic.sparse.combine import Combine
from moesaic.sparse.executors import EXECUTORS
from moesaic.sparse.layer import set_executor, sparse_layers
from moesaic.sparse.norm_mlp import NormMLP
from moesaic.sparse.partition import BalancedKMeans
from moesaic.sparse.score import Oracle
from moesaic.sparse.select import DynamicK
from moesaic.sparse.trace import count_routing
from moesaic.training.fit import FitConfig

FIT = FitConfig(steps=6, batch_size=4, lr=1e-3)


def sparsify(**changes) -> Sparsify:
    settings = {
        "fit": FIT,
        "activation": "relu",
        "penalty": "square_hoyer",
        "alpha": 2.0,
        "relative": True,
        "schedule": "constant",
    }
    return Sparsify(**{**settings, **changes})


def method() -> SparseMethod:
    return SparseMethod(
        name="d2dmoe",
        partition=BalancedKMeans(num_blocks=8),
        score=NormMLP(hidden_dim=16),
        select=DynamicK(tau=0.2),
        combine=Combine(),
        oracle=Oracle(target="output_norm"),
        adapt_each_budget=False,
        calibration_tokens=512,
    )


def routers(**changes) -> TrainRouters:
    settings = {
        "fit": FitConfig(steps=40, batch_size=64, lr=1e-2, optimizer="adam", clip_norm=None),
        "target": "output_norm",
        "normalise": "quantile",
        "loss": "mse",
        "split": "tail",
        "keep": "best",
    }
    return TrainRouters(**{**settings, **changes})


def test_square_hoyer_at_its_limits():
    units_TF = torch.zeros(4, 10)
    units_TF[0, 3] = -7.0
    units_TF[1] = 0.25
    units_TF[2, :5] = 2.0
    torch.testing.assert_close(square_hoyer(units_TF), torch.tensor([1.0, 10.0, 5.0, 0.0]))
    noise_TF = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(square_hoyer(100 * noise_TF), square_hoyer(noise_TF))
    torch.testing.assert_close(l1(units_TF), torch.tensor([7.0, 2.5, 10.0, 0.0]))


def test_relu_of_noise_has_a_hoyer_of_f_over_pi():
    noise_TF = torch.randn(4000, 352, generator=torch.Generator().manual_seed(0)).relu()
    assert square_hoyer(noise_TF).mean().item() / 352 == pytest.approx(1 / math.pi, abs=0.01)


def test_a_dead_vector_has_a_finite_gradient_and_alive_ones_that_of_the_formula():
    units_TF = torch.rand(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(square_hoyer, units_TF.requires_grad_())
    dead_TF = torch.zeros(1, 6, requires_grad=True)
    square_hoyer(dead_TF).sum().backward()
    assert dead_TF.grad.eq(0).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [3, 3, 3, 3, 3]), ("linear", [0, 0.75, 1.5, 2.25, 3]), ("linear_warmup", [0, 1.5, 3, 3, 3])],
)
def test_schedules_of_alpha(schedule, expected):
    assert [alpha_at(step, 5, 3.0, schedule) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gpt_neox"])
def test_the_units_are_the_first_half_of_the_ffn_only(tmp_path, family):
    """ReLU: the hidden activations; GLU: not a function of the up branch; GELU: the clamped distance from -10."""
    model = tiny_model(family)
    with torch.no_grad():
        for site in find_ffns(model):
            if site.read().gated:
                site.read().up_FD.mul_(-3)
    module = SparseTraining(toy_job(model, None, tmp_path), [], sparsify())
    _, units_LTF = module.observed({"input_ids": ids_NC()})
    reference = tiny_model(family)
    module = SparseTraining(toy_job(reference, None, tmp_path), [], sparsify())
    first_TF = module.observed({"input_ids": ids_NC()})[1][0]
    torch.testing.assert_close(units_LTF[0], first_TF)
    assert first_TF.shape == (4 * 16, 48)
    assert first_TF.dtype == torch.float32


def test_what_is_visible_of_each_kind_of_ffn():
    pre = torch.tensor([[-30.0, -10.0, -1.0, 0.0, 2.0]])
    kinds = {family: find_ffns(tiny_model(family))[0].read() for family in ("opt", "gpt2", "llama")}
    seen = {family: visible_units(ffn)(pre)[0].tolist() for family, ffn in kinds.items()}
    assert seen["opt"] == [0, 0, 0, 0, 2]
    assert seen["gpt2"] == [0, 0, 9, 10, 12]
    assert seen["llama"] == pytest.approx(torch.nn.functional.silu(pre)[0].tolist())


def test_training_steps_add_alpha_times_the_mean_penalty(tmp_path):
    batch = {"input_ids": ids_NC()}
    parts = {}
    for relative in (True, False):
        job = toy_job(with_activation(tiny_model("llama"), "relu").eval(), None, tmp_path)
        module = SparseTraining(job, [], sparsify(relative=relative))
        units_LTF = module.observed(batch)[1]
        expected = torch.stack([square_hoyer(u_TF).mean() for u_TF in units_LTF]).mean() / (48 if relative else 1)
        parts[relative] = step = module.training_step(batch, 0)
        torch.testing.assert_close(step["penalty"], expected)
        torch.testing.assert_close(step["loss"], step["task_loss"] + 2.0 * expected)
    torch.testing.assert_close(parts[False]["penalty"], 48 * parts[True]["penalty"])


def test_without_alpha_it_is_plain_language_model_training(tmp_path):
    job = toy_job(tiny_model("llama"), None, tmp_path / "none")
    sparsify(alpha=0.0).run(job)
    plain = toy_job(with_activation(tiny_model("llama"), "relu"), None, tmp_path / "plain")
    trained = train_only(plain.model, ("all",), None)
    plain.model.train()
    fit_language_model(LanguageModelling(plain.model, trained, FIT), plain, FIT, label="plain")
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(job.model.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("penalty", ["square_hoyer", "l1"])
def test_a_larger_alpha_leaves_sparser_layers_and_no_dead_ones(tmp_path, penalty):
    strong = FitConfig(steps=25, batch_size=8, lr=5e-3)
    facts = {}
    for alpha in (0.0, 8.0):
        job = toy_job(tiny_model("llama"), None, tmp_path / f"{penalty}{alpha}")
        facts[alpha] = sparsify(penalty=penalty, alpha=alpha, fit=strong).run(job)
        assert {site.read().activation for site in find_ffns(job.model)} == {"relu"}
        assert not job.model.training
    share = {alpha: sum(fact["hoyer_frac_L"]) for alpha, fact in facts.items()}
    assert share[8.0] < 0.8 * share[0.0]
    assert len(facts[8.0]["all_zero_tokens_frac_L"]) == 2
    assert facts[8.0]["tokens"] == 25 * 8 * 16


def test_a_kept_activation_is_kept(tmp_path):
    job = toy_job(tiny_model("gpt2"), None, tmp_path)
    sparsify(activation="keep").run(job)
    assert {site.read().activation for site in find_ffns(job.model)} == {"gelu_new"}


def test_an_interrupted_run_goes_on_with_the_alpha_of_its_step(tmp_path, monkeypatch):
    phase = sparsify(schedule="linear", fit=FitConfig(steps=8, batch_size=4, lr=1e-3, checkpoint_every_steps=1))
    whole = toy_job(tiny_model("llama"), None, tmp_path / "whole")
    phase.run(whole)
    step = SparseTraining.training_step

    def stop_at_five(self, batch, index):
        if self.global_step == 5:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(SparseTraining, "training_step", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        phase.run(toy_job(tiny_model("llama"), None, tmp_path / "cut"))
    monkeypatch.undo()
    resumed = toy_job(tiny_model("llama"), None, tmp_path / "cut")
    phase.run(resumed)
    for name, value in weights(whole.model).items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_negative_alpha_is_refused():
    with pytest.raises(ValueError, match=r"prepare\.alpha=-1\.0 must not be negative"):
        sparsify(alpha=-1.0)


def test_only_routers_are_trained_and_the_model_still_computes_the_dense_function(tmp_path):
    dense, model, calibration = toy_conversion(method(), tmp_path)
    before = weights(model)
    routers().run(toy_job(model, calibration, tmp_path / "fit"))
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".score." in name for name in changed)
    torch.testing.assert_close(model(ids_NC()).logits, dense(ids_NC()).logits, atol=1e-5, rtol=1e-4)


def test_layers_train_as_if_alone(tmp_path):
    """Another layer's data changes nothing in this one: joint and separate training are the same without clipping."""
    found = []
    for name in ("as_it_is", "other"):
        _, model, calibration = toy_conversion(method(), tmp_path / name)
        if name == "other":
            path = calibration.folder / "layer_001.safetensors"
            save_file({"inputs_TD": 3 * torch.ones_like(calibration.inputs_TD(1))}, path)
        routers().run(toy_job(model, calibration, tmp_path / name / "fit"))
        found.append([layer.score.state_dict() for layer in sparse_layers(model)])
    assert torch.equal(found[0][0]["in_WD"], found[1][0]["in_WD"])
    assert not torch.equal(found[0][1]["in_WD"], found[1][1]["in_WD"])


@pytest.mark.parametrize("executor", sorted(EXECUTORS))
def test_tau_zero_is_the_dense_model_in_every_executor(tmp_path, executor):
    dense, model, _ = toy_conversion(method(), tmp_path)
    select_blocks(model, DynamicK(tau=0.0))
    set_executor(model, executor)
    torch.testing.assert_close(model(ids_NC()).logits, dense(ids_NC()).logits, atol=1e-5, rtol=1e-4)


def test_the_whole_curve_comes_from_one_model_and_falls_to_one_block(tmp_path):
    _, model, calibration = toy_conversion(method(), tmp_path)
    routers().run(toy_job(model, calibration, tmp_path / "fit"))
    blocks = []
    for tau in (0.0, 0.1, 0.3, 0.6, 1.0):
        select_blocks(model, DynamicK(tau=tau))
        with count_routing(model) as counts, torch.no_grad():
            model(ids_NC())
        blocks.append(counts.mean_blocks_L())
    assert blocks[0] == [8.0, 8.0]
    assert blocks[-1] == [1.0, 1.0]
    assert all(after <= before for pair in pairwise(blocks) for before, after in zip(*pair, strict=True))


@pytest.mark.parametrize("tau_code", [0.9, 0.5, 0.01])
def test_the_released_threshold_is_one_minus_tau(tau_code):
    score_TB = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    released_TB = score_TB >= score_TB.amax(dim=1, keepdim=True) * (1 - tau_code)
    assert torch.equal(DynamicK(tau=1 - tau_code)(score_TB).active_TB(), released_TB)
