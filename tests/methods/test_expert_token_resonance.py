"""The resonant phase: its losses, what it trains and leaves behind, and that a killed fit goes on exactly."""

from dataclasses import replace

import pytest
import torch
from methods.toy import ids_NC, toy_conversion, toy_job, weights

from moesaic.methods.base import SparseMethod, routed_by, select_blocks
from moesaic.methods.controls import apply_arm
from moesaic.methods.expert_token_resonance import ResonantTraining, TrainResonance, separation
from moesaic.methods.lm import task_loss, train_only
from moesaic.sparse.aligned import ScoreAligned
from moesaic.sparse.capacity import AffinityMass, BoundCapacity, FixedCapacity
from moesaic.sparse.combine import Combine
from moesaic.sparse.expert_choice import ExpertChoice
from moesaic.sparse.grap import Grap, LearnedCos
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.loss_free import LossFreeTopK
from moesaic.sparse.model import load_model
from moesaic.sparse.resonance import TokenThenExpert
from moesaic.sparse.score import Oracle
from moesaic.sparse.softmax_combine import SoftmaxCombine
from moesaic.sparse.trace import count_routing
from moesaic.training.fit import FitConfig

FIT = FitConfig(steps=6, batch_size=4, lr=1e-2, weight_decay=0.1)
SELECT = TokenThenExpert(top_l=2, capacity=AffinityMass(rho=0.8, highest=1.1))


def method(**changes) -> SparseMethod:
    settings = {
        "name": "expert_token_resonance",
        "partition": ScoreAligned(num_blocks=4, score=Grap()),
        "score": Grap(),
        "select": SELECT,
        "combine": SoftmaxCombine(scale="total", gamma=0.0, learn_gamma=True),
        "oracle": Oracle(target="output_norm"),
        "adapt_each_budget": True,
        "calibration_tokens": 512,
    }
    return SparseMethod(**{**settings, **changes})


def phase(**changes) -> TrainResonance:
    return TrainResonance(**{"fit": FIT, "alpha": 0.01, "mu": 0.0, "aux_temp": "sqrt_dim", **changes})


def converted(tmp_path, **changes):
    given = method(**changes)
    dense, model, calibration = toy_conversion(given, tmp_path)
    select_blocks(model, given.select)
    return dense, model, calibration


def losses(model, **changes):
    model.train()
    module = ResonantTraining(model, train_only(model, ("ffn", "router"), None), phase(**changes))
    return {name: value.item() for name, value in module.training_step({"input_ids": ids_NC()}, 0).items()}


def test_converted_with_all_blocks_is_dense(tmp_path):
    dense, model, _ = toy_conversion(method(), tmp_path)
    torch.testing.assert_close(model(ids_NC()).logits, dense(ids_NC()).logits, atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_sum_of_its_parts_and_says_what_was_dropped(tmp_path):
    _, model, _ = converted(tmp_path)
    parts = losses(model, alpha=0.3, mu=0.2, nodes=2)
    assert parts["loss"] == pytest.approx(
        parts["task_loss"] + 0.3 * parts["balance_loss"] + 0.2 * parts["locality_loss"], rel=1e-5
    )
    assert parts["kept_frac"] == pytest.approx(1 - parts["drop_frac"])
    assert 0 < parts["drop_frac"] < 1
    assert parts["locality_loss"] > 0
    off = losses(model, alpha=0.0)
    assert off["loss"] == off["task_loss"]


def test_auxiliary_losses_at_a_flat_softmax_have_their_closed_forms(tmp_path):
    _, model, _ = converted(tmp_path)
    parts = losses(model, aux_temp=1e-7, mu=1.0, nodes=2, leak=0.01)
    assert parts["balance_loss"] == pytest.approx(1, abs=1e-5)
    # Two of four blocks are a node's own: ln(1/4 / 0.495) and ln(1/4 / 0.005), half each.
    assert parts["locality_loss"] == pytest.approx(0.5 * (-0.68310 + 3.91202), abs=1e-4)


def test_losses_reach_the_inputs_though_the_router_has_no_weights(tmp_path):
    _, model, _ = converted(tmp_path)
    model.train()
    parameters = train_only(model, ("ffn",), None)
    module = ResonantTraining(model, parameters, phase(alpha=1.0))
    task = task_loss(model, {"input_ids": ids_NC()})
    parts = module.training_step({"input_ids": ids_NC()}, 0)
    auxiliary = parts["loss"] - task
    first = torch.autograd.grad(auxiliary, sparse_layers(model)[0].experts.up_BSD, allow_unused=True)[0]
    assert first is not None
    assert first.abs().sum() > 0


@pytest.mark.parametrize(
    "select",
    [
        SELECT,
        TokenThenExpert(top_l=1, capacity=BoundCapacity(), cap_scope="sequence", eval_mode="batch_topc"),
        TokenThenExpert(top_l=2, capacity=FixedCapacity(factor=1.1), overflow="second_choice"),
        ExpertChoice(blocks_per_token=2.0),
        LossFreeTopK(k=2, cosine=True),
    ],
)
@pytest.mark.parametrize("score", [Grap(), LearnedCos()])
def test_ffns_gamma_and_learned_scores_are_trained_and_nothing_else(select, score, tmp_path):
    _, model, calibration = converted(tmp_path, select=select, score=score)
    before = weights(model)
    facts = phase().run(toy_job(model, calibration, tmp_path / "fit"))
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    kinds = {"experts", "combine", "select_state", "score"}
    assert all(kinds & set(name.split(".")) for name in moved)
    assert any("experts.up_BSD" in name for name in moved)
    assert sum("combine.gamma" in name for name in moved) == len(sparse_layers(model))
    assert any(".score." in name for name in moved) == isinstance(score, LearnedCos)
    assert facts["steps"] == 6
    assert facts["tokens"] == 6 * 4 * 16
    assert [len(facts[name]) for name in ("ch_index_L", "token_correlation_L_before", "gamma_L")] == [2, 2, 2]
    assert not model.training


@pytest.mark.parametrize(
    "combine", [SoftmaxCombine(gamma=3.0), SoftmaxCombine(scale="total", gamma=0.0, learn_gamma=True)]
)
@pytest.mark.parametrize("group_map", ["strided", "rotation"])
def test_what_training_leaves_is_saved_with_the_model(combine, group_map, tmp_path):
    _, model, calibration = converted(tmp_path, combine=combine, score=Grap(group_map=group_map))
    facts = phase().run(toy_job(model, calibration, tmp_path / "fit"))
    state = sparse_layers(model)[0].select_state
    assert state.seen_B.tolist() == [6] * 4
    assert facts["kept_ratio_LB"][0] == pytest.approx(state.kept_ratio_B.tolist())
    model.save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    for name, value in state.state_dict().items():
        assert torch.equal(sparse_layers(loaded)[0].select_state.state_dict()[name], value), name
    torch.testing.assert_close(loaded(ids_NC()).logits, model(ids_NC()).logits)


def test_a_fit_that_stopped_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    _, whole, calibration = converted(tmp_path / "a")
    phase().run(toy_job(whole, calibration, tmp_path / "whole"))
    _, halted, calibration = converted(tmp_path / "b")

    class Stopped(Exception):
        pass

    step = ResonantTraining.training_step

    def stopping(self, batch, index):
        if self.global_step == 3:
            raise Stopped
        return step(self, batch, index)

    often = replace(FIT, checkpoint_every_steps=1)
    monkeypatch.setattr(ResonantTraining, "training_step", stopping)
    with pytest.raises(Stopped):
        phase(fit=often).run(toy_job(halted, calibration, tmp_path / "halted"))
    monkeypatch.setattr(ResonantTraining, "training_step", step)
    _, resumed, calibration = converted(tmp_path / "c")
    assert (tmp_path / "halted" / "last.ckpt").exists()
    phase(fit=often).run(toy_job(resumed, calibration, tmp_path / "halted"))
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_controls_run_the_share_that_the_adapted_model_ran(tmp_path):
    given = method()
    _, model, calibration = converted(tmp_path)
    for arm in ("oracle_router", "random_router"):
        apply_arm(model, arm, given, 2, calibration, 0, active_frac_L=[0.3, 0.4])
        with torch.no_grad(), count_routing(model) as counts:
            model(calibration.windows_NC())
        assert counts.active_frac_L() == pytest.approx([0.3, 0.4], abs=0.05)
        assert max(counts.mean_blocks_L()) <= 2


def test_separation_sees_the_model_as_it_is(tmp_path):
    _, model, calibration = converted(tmp_path)
    before = separation(model, calibration)
    with torch.no_grad():
        sparse_layers(model)[0].experts.down_BSD.mul_(3)
    after = separation(model, calibration)
    assert before["ch_index_L"][0] == after["ch_index_L"][0]
    assert before["ch_index_L"][1] != after["ch_index_L"][1]
    assert separation(model, None) == {}


def test_another_routing_for_a_while_leaves_the_state_alone(tmp_path):
    _, model, calibration = converted(tmp_path)
    phase().run(toy_job(model, calibration, tmp_path / "fit"))
    state = sparse_layers(model)[0].select_state
    with routed_by(model, ExpertChoice(blocks_per_token=1.0), Combine()):
        assert sparse_layers(model)[0].select_state is None
    assert sparse_layers(model)[0].select_state is state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -1.0}, "alpha=-1.0 must not be negative"),
        ({"leak": 0.0}, r"leak=0.0 is outside 0\.\.1 \(both excluded\): a hard zero has no finite divergence"),
        ({"nodes": 5}, r"nodes=5 is outside 1\.\.fit.batch_size=4"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        phase(**changes)
