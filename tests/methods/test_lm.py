"""Fine-tuning trains what it is told to and nothing else, on tokens that depend on the seed alone."""

from dataclasses import replace

import pytest
import torch
from methods.toy import toy_conversion, toy_job, weights
from toys import tiny_model

from moesaic.methods.base import SparseMethod, select_blocks
from moesaic.methods.dense import Dense
from moesaic.methods.lm import FinetuneLM, LanguageModelling, train_only
from moesaic.sparse.combine import Combine
from moesaic.sparse.partition import Contiguous
from moesaic.sparse.score import Linear, SubsetOracle
from moesaic.sparse.select import TopK
from moesaic.training.fit import FitConfig

FIT = FitConfig(steps=8, batch_size=4, lr=1e-2)


def routed(**combine) -> SparseMethod:
    return SparseMethod(
        name="routed",
        partition=Contiguous(num_blocks=4),
        score=Linear(activation="sigmoid"),
        select=TopK(k=2),
        combine=Combine(**combine),
        oracle=SubsetOracle(),
        adapt_each_budget=True,
        calibration_tokens=512,
    )


def changed_by(phase: FinetuneLM, tmp_path, **combine) -> tuple[set[str], dict]:
    _, model, calibration = toy_conversion(routed(**combine), tmp_path)
    select_blocks(model, TopK(k=2))
    before = weights(model)
    facts = phase.run(toy_job(model, calibration, tmp_path / "fit"))
    return {name for name, value in weights(model).items() if not torch.equal(value, before[name])}, facts


def test_ffn_trains_the_experts_only(tmp_path):
    changed, facts = changed_by(FinetuneLM(fit=FIT), tmp_path)
    assert changed
    assert all(".experts." in name for name in changed)
    assert facts["tokens"] == 8 * 4 * 16


@pytest.mark.parametrize("straight_through", ["none", "selected", "dense"])
def test_the_router_learns_through_weight_one_only_with_a_straight_through_gradient(tmp_path, straight_through):
    phase = FinetuneLM(fit=FIT, train=("ffn", "router"))
    changed, _ = changed_by(phase, tmp_path, straight_through=straight_through)
    assert any(".score." in name for name in changed) == (straight_through != "none")


def test_a_learned_scale_is_trained_with_the_experts(tmp_path):
    changed, _ = changed_by(FinetuneLM(fit=FIT), tmp_path, scale="learned")
    assert any(name.endswith("combine.scale") for name in changed)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_dense_same_tokens_trains_the_ffns_only(tmp_path, family):
    model = tiny_model(family)
    before = weights(model)
    FinetuneLM(fit=FIT).run(toy_job(model, None, tmp_path))
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("mlp" in name or "fc" in name for name in changed), changed


def test_dense_and_sparse_see_the_same_tokens_in_the_same_order(tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    step = LanguageModelling.training_step

    def note(module, batch, index):
        seen.setdefault(type(module.model).__name__, []).append(batch["input_ids"].tolist())
        return step(module, batch, index)

    monkeypatch.setattr(LanguageModelling, "training_step", note)
    _, model, calibration = toy_conversion(routed(), tmp_path)
    FinetuneLM(fit=FIT).run(toy_job(model, calibration, tmp_path / "sparse"))
    FinetuneLM(fit=FIT).run(toy_job(tiny_model("llama"), None, tmp_path / "dense"))
    sparse, dense = seen.values()
    assert sparse == dense
    assert len(sparse) == 8


def test_two_phases_share_the_tokens_of_one_run(tmp_path, monkeypatch):
    seen: list = []
    step = LanguageModelling.training_step

    def note(module, batch, index):
        seen.append(batch["input_ids"].tolist())
        return step(module, batch, index)

    monkeypatch.setattr(LanguageModelling, "training_step", note)
    facts = []
    for name, span_frac in {"whole": (0.0, 1.0), "first": (0.0, 0.6), "second": (0.6, 1.0)}.items():
        phase = FinetuneLM(fit=replace(FIT, warmup_steps=4, accumulate=2), span_frac=span_frac)
        facts.append(phase.run(toy_job(tiny_model("llama"), None, tmp_path / name)))
    assert [fact["steps"] for fact in facts] == [8, 5, 3]
    assert facts[0]["tokens"] == facts[1]["tokens"] + facts[2]["tokens"]
    assert seen[16:] == seen[:16]


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train=\['router'\] leaves nothing to train"):
        train_only(tiny_model("llama"), ("router",), None)


def test_dense_converts_nothing():
    assert not Dense(name="dense").converts
