"""DynaMoE's fine-tune on a toy model: what it trains, what it knows of difficulty, and that a kill costs nothing."""

import math

import pytest
import torch
from methods.toy import ids_NC, toy_conversion, toy_job, weights

from moesaic.methods.base import SparseMethod, select_blocks
from moesaic.methods.dynamoe import LevelFinetune, LevelTraining, base_similarities, optimizer_groups, taught
from moesaic.methods.histogram import HistogramRouters, level_histograms
from moesaic.methods.lm import router_parameters, train_only
from moesaic.methods.share import SolveShares, bracket, calibration_batches, mean_share
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.levels import LevelCombine, LevelMLP, Nested, RandomLevels
from moesaic.sparse.partition import Importance
from moesaic.sparse.priority import PriorityLevels
from moesaic.sparse.score import Linear
from moesaic.sparse.select import AllBlocks, TopK
from moesaic.sparse.similarity import SimilarityOracle, label_levels, level_similarity
from moesaic.sparse.trace import record_routing
from moesaic.training.fit import FitConfig

SHARES = (0.25, 0.5, 0.75)
SELECT = Nested(shares=SHARES)


def dynamoe(by: str = "one", init: str = "full") -> SparseMethod:
    return SparseMethod(
        name="dynamoe",
        partition=Importance(num_blocks=8),
        score=LevelMLP(hidden=8, init=init),
        select=SELECT,
        combine=LevelCombine(by=by),
        oracle=SimilarityOracle(similarity="rel_mse"),
        random=RandomLevels(),
        adapt_each_budget=False,
        calibration_tokens=512,
    )


def phase(steps: int = 30, **changes) -> LevelFinetune:
    recipe = {
        "levels": "linear",
        "similarity": "rel_mse",
        "label_rule": "first_above",
        "label_source": "current",
        "dispatch": "router",
        "label_first_frac": 0.1,
        "explore_frac": 0.1,
        "lm_weight": 1.0,
        "router_weight": 1.0,
        "train": ("ffn", "router"),
        "router_lr": 1e-1,
        "label_share": 0.5,
    }
    return LevelFinetune(fit=FitConfig(steps=steps, batch_size=8, lr=1e-2), **{**recipe, **changes})


def changed_since(before: dict[str, torch.Tensor], model) -> set[str]:
    """The names of the weights that differ; knobs are NaN until they are solved."""
    after = weights(model)
    return {name for name in after if not torch.equal(after[name].nan_to_num(), before[name].nan_to_num())}


@pytest.fixture
def converted(tmp_path):
    _, model, calibration = toy_conversion(dynamoe(), tmp_path)
    select_blocks(model, SELECT)
    return model, calibration


@pytest.fixture
def solved(converted, tmp_path):
    """A trained and solved model, its calibration, and the facts of both phases."""
    model, calibration = converted
    trained = phase().run(toy_job(model, calibration, tmp_path / "fit"))
    facts = SolveShares(tolerance=0.01).run(toy_job(model, calibration, tmp_path / "shares"))
    return model, calibration, trained, facts


def test_routers_learn_the_labels_better_than_their_most_frequent_one(converted, tmp_path):
    model, calibration = converted
    facts = phase(steps=120, lm_weight=0.0, train=("router",)).run(toy_job(model, calibration, tmp_path / "fit"))
    assert facts["tokens"] == 120 * 8 * 16
    for top1, prior, near in zip(
        facts["router_top1_L"], facts["router_prior_L"], facts["router_within_one_L"], strict=True
    ):
        assert prior < top1 <= near
    assert facts["history"][-1]["router_accuracy"] > facts["history"][0]["router_accuracy"]


def test_what_is_trained_changes_and_nothing_else(converted, tmp_path):
    model, calibration = converted
    before = weights(model)
    phase(steps=2).run(toy_job(model, calibration, tmp_path / "fit"))
    changed = changed_since(before, model)
    assert any(".score." in name for name in changed)
    assert any(".experts." in name for name in changed)
    assert all(".score." in name or ".experts." in name for name in changed)
    assert {layer.select for layer in sparse_layers(model)} == {SELECT}


def test_theta_gives_labels_of_the_wanted_share_on_the_dense_stream(converted, tmp_path):
    model, calibration = converted
    facts = phase(steps=1).run(toy_job(model, calibration, tmp_path / "fit"))
    histograms = facts["base_labels_LE_by_theta"][f"{facts['theta']:.4g}"]
    mean = sum(share * (e + 1) / 8 for row in histograms for e, share in enumerate(row)) / len(histograms)
    assert mean == pytest.approx(0.5, abs=0.01)


def test_the_base_labels_are_those_of_the_dense_models_inputs(converted):
    model, calibration = converted
    recipe = phase()
    batches = calibration_batches(calibration, 512, model.device)
    with taught(model, recipe, batches[0]) as lesson:
        score_LTE = base_similarities(model, lesson, batches)
    for index, layer in enumerate(sparse_layers(model)):
        expected = level_similarity(layer.experts, calibration.inputs_TD(index), tuple(range(1, 9)), "rel_mse")
        torch.testing.assert_close(score_LTE[index], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dispatch", ["label", "router", "random"])
def test_tokens_run_the_level_of_the_dispatch(converted, dispatch):
    model, calibration = converted
    batches = calibration_batches(calibration, 64, model.device)
    with taught(model, phase(dispatch=dispatch), batches[0]) as lesson, torch.no_grad():
        lesson.theta = 0.6
        with lesson.given(dispatch) as seen, record_routing(model) as trace:
            model(**batches[0])
    for told, records in zip(seen, trace.layers, strict=True):
        assert torch.equal(records[0].routing.count_T(), told.level_T + 1)
        assert torch.equal(told.label_T, label_levels(told.similarity_TE, 0.6, "first_above"))
        if dispatch == "random":
            assert len(told.level_T.unique()) > 2
        else:
            assert torch.equal(told.level_T, told.label_T if dispatch == "label" else told.choice_T)


def test_exploring_moves_its_share_of_tokens_in_training_only(converted):
    model, calibration = converted
    batches = calibration_batches(calibration, 512, model.device)
    with taught(model, phase(explore_frac=0.5), batches[0]) as lesson, torch.no_grad():
        for training, expected in ((False, 0.0), (True, 0.5 * 7 / 8)):
            model.train(training)
            with lesson.given("label") as seen:
                for batch in batches:
                    model(**batch)
            moved = torch.cat([told.level_T != told.label_T for told in seen]).float().mean()
            assert moved == pytest.approx(expected, abs=0.06)


def test_frozen_labels_come_from_the_experts_as_they_were(converted):
    model, calibration = converted
    batches = calibration_batches(calibration, 64, model.device)
    labels = {}
    for source in ("current", "frozen"):
        with taught(model, phase(label_source=source), batches[0]) as lesson, torch.no_grad():
            lesson.theta = 0.6
            first = sparse_layers(model)[0].experts
            before_BSD = first.down_BSD.clone()
            for scale in (1.0, 5.0):
                first.down_BSD[:2] *= scale
                with lesson.given("label") as seen:
                    model(**batches[0])
                labels[source, scale] = seen[0].label_T
            first.down_BSD.copy_(before_BSD)
    assert torch.equal(labels["frozen", 1.0], labels["frozen", 5.0])
    assert torch.equal(labels["current", 1.0], labels["frozen", 1.0])
    assert not torch.equal(labels["current", 1.0], labels["current", 5.0])


def test_a_soft_dispatch_gives_the_routers_a_gradient_of_the_task(converted, tmp_path):
    model, calibration = converted
    before = weights(model)
    recipe = phase(steps=2, dispatch="soft", router_weight=0.0, train=("router",))
    recipe.run(toy_job(model, calibration, tmp_path / "fit"))
    assert any(".score." in name for name in changed_since(before, model))
    assert all(layer.combine.config == LevelCombine() for layer in sparse_layers(model))


def test_the_task_teaches_no_router_that_is_dispatched_hard(converted, tmp_path):
    model, calibration = converted
    before = weights(model)
    recipe = phase(steps=2, router_weight=0.0, train=("ffn", "router"))
    recipe.run(toy_job(model, calibration, tmp_path / "fit"))
    changed = changed_since(before, model)
    assert changed
    assert not any(".score." in name for name in changed)


def test_routers_have_their_own_rate_and_no_decay(converted):
    model, _ = converted
    groups = optimizer_groups(model, phase(), train_only(model, ("ffn", "router"), None))
    routers = {id(p) for p in router_parameters(model)}
    assert {id(p) for p in groups[2]["params"]} == routers
    assert (groups[2]["lr"], groups[2]["weight_decay"]) == (1e-1, 0.0)
    assert not routers & {id(p) for group in groups[:2] for p in group["params"]}


def test_labels_of_the_residual_stream(converted, tmp_path):
    model, calibration = converted
    facts = phase(steps=2, similarity="resid_cos").run(toy_job(model, calibration, tmp_path / "fit"))
    assert 0 < facts["theta"] < 1
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_training_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    ends = []
    for name, killed in (("whole", False), ("killed", True)):
        _, model, calibration = toy_conversion(dynamoe(), tmp_path / name)
        select_blocks(model, SELECT)
        recipe = phase(steps=8)
        object.__setattr__(recipe, "fit", FitConfig(steps=8, batch_size=8, lr=1e-2, checkpoint_every_steps=2))
        if killed:
            step = LevelTraining.training_step

            def dies(self, batch, index, step=step):
                if self.global_step == 5:
                    raise MemoryError
                return step(self, batch, index)

            monkeypatch.setattr(LevelTraining, "training_step", dies)
            with pytest.raises(MemoryError):
                recipe.run(toy_job(model, calibration, tmp_path / name / "fit"))
            monkeypatch.setattr(LevelTraining, "training_step", step)
            _, model, calibration = toy_conversion(dynamoe(), tmp_path / name / "again")
            select_blocks(model, SELECT)
        recipe.run(toy_job(model, calibration, tmp_path / name / "fit"))
        ends.append(model)
    assert not changed_since(weights(ends[0]), ends[1])


def test_shares_are_solved_for_the_whole_model(solved):
    model, calibration, _, facts = solved
    batches = calibration_batches(calibration, 512, model.device)
    for point in facts["shares"]:
        assert point["realised"] == pytest.approx(point["wanted"], abs=0.02)
        select_blocks(model, SELECT.with_budget(point["wanted"]))
        assert mean_share(model, batches) == pytest.approx(point["realised"])
    assert [point["knob"] for point in facts["shares"]] == sorted(point["knob"] for point in facts["shares"])
    select_blocks(model, SELECT.with_budget(0.375))
    between = mean_share(model, batches)
    assert facts["shares"][0]["realised"] - 0.02 <= between <= facts["shares"][1]["realised"] + 0.02


def test_knobs_are_solved_for_the_shares_of_now(solved, tmp_path):
    model, calibration, *_ = solved
    select_blocks(model, Nested(shares=(0.6,)))
    facts = SolveShares().run(toy_job(model, calibration, tmp_path / "again"))
    assert [point["wanted"] for point in facts["shares"]] == [0.6]
    assert {layer.select_state.shares for layer in sparse_layers(model)} == {(0.6,)}
    select_blocks(model, Nested())
    assert SolveShares().run(toy_job(model, calibration, tmp_path / "none"))["skipped"]
    assert all(layer.select_state is None for layer in sparse_layers(model))


def test_a_bracket_ends_where_nothing_is_left_to_gain():
    assert bracket(lambda knob: 1 / (1 + math.exp(-knob)), 0.9) == (-1.0, 4.0)
    low, high = bracket(lambda knob: 0.25, 0.5)
    assert low == -1.0
    assert math.isfinite(high)


def test_other_selections_have_no_shares_to_solve(converted, tmp_path):
    model, calibration = converted
    select_blocks(model, AllBlocks())
    for wrong in (SolveShares(), HistogramRouters()):
        with pytest.raises(ValueError, match="Nested"):
            wrong.run(toy_job(model, calibration, tmp_path / "x"))


def test_random_levels_come_as_often_as_the_routers_gave_them(solved, tmp_path):
    model, calibration, *_ = solved
    batches = calibration_batches(calibration, 512, model.device)
    learned = {}
    for share in SHARES:
        select_blocks(model, SELECT.with_budget(share))
        learned[share] = level_histograms(model, batches, "linear")
    select_blocks(model, SELECT)
    HistogramRouters().run(toy_job(model, calibration, tmp_path / "histogram"))
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    for share in SHARES:
        select_blocks(model, SELECT.with_budget(share))
        drawn = level_histograms(model, batches, "linear")
        for wanted_E, drawn_E in zip(learned[share], drawn, strict=True):
            expected_E = wanted_E * tokens
            occurs = expected_E > 0
            assert (drawn_E[~occurs] == 0).all()
            chi_square = ((drawn_E * tokens - expected_E)[occurs].square() / expected_E[occurs]).sum()
            assert chi_square < 26.1  # 8 degrees of freedom at most, p 0.001
    select_blocks(model, AllBlocks())
    assert torch.isfinite(model(input_ids=ids_NC()).logits).all()


def test_capacities_can_dispatch_in_training(tmp_path):
    _, model, calibration = toy_conversion(dynamoe("one_plus", "zero"), tmp_path)
    select_blocks(model, PriorityLevels(mean_share=0.5))
    before = weights(model)
    recipe = phase(steps=3, train_select=PriorityLevels(mean_share=0.5), router_weight=0.0, label_first_frac=0.0)
    recipe.run(toy_job(model, calibration, tmp_path / "fit"))
    changed = changed_since(before, model)
    assert any(name.endswith("combine.alpha") for name in changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"explore_frac": 1.5}, r"explore_frac=1\.5 is outside 0\.\.1"),
        ({"theta": 0.8}, "two ways to say one thing"),
        ({"label_share": None}, "two ways to say one thing"),
    ],
)
def test_recipes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        phase(**changes)


def test_scores_and_selection_must_speak_of_the_same_levels():
    with pytest.raises(ValueError, match="scores a token"):
        SparseMethod(
            name="x",
            partition=Importance(num_blocks=8),
            score=Linear(),
            select=Nested(levels="geometric"),
            combine=LevelCombine(),
            oracle=SimilarityOracle(similarity="cos"),
            adapt_each_budget=False,
            calibration_tokens=512,
        )
    assert TopK(k=2).num_scores(8) == 8
