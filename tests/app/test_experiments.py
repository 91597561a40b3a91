"""Every shipped method runs from config to record on a toy: converted, trained a step, evaluated at each budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.app.compose import compose_plain
from moesaic.app.groups import conf_folder
from moesaic.app.pipeline import plan_experiment, run_experiment
from moesaic.app.schema import MoesaicConfig
from moesaic.config.errors import ConfigError
from moesaic.config.strict import strict_object

METHODS = sorted(path.stem for path in (conf_folder() / "method").glob("*.yaml"))


def run(overrides: list[str]) -> tuple[Path, dict]:
    plain = compose_plain(overrides)
    folder = run_experiment(strict_object(MoesaicConfig, plain), plain)
    return folder, json.loads((folder / "record.json").read_text())


def arms(record: dict) -> set[tuple[str, float | None]]:
    return {(point["arm"], point["budget"]) for point in record["points"]}


@pytest.mark.parametrize("method", METHODS)
def test_method_goes_from_config_to_record(method, overrides):
    _, record = run([*overrides, f"method={method}"])
    assert record["state"] == "done"
    assert record["method"]["name"] == method
    budgets = record["config"]["method"].get("budgets") or [None]
    for budget in budgets:
        assert {("adapted", budget), ("dense", None)} & arms(record)
    for point in record["points"]:
        assert point["failure"] is None
        assert point["quality"]["perplexity"] > 1
        assert 0 < point["active_ffn_frac"] <= 1


@pytest.mark.parametrize("variant", ["as_published", "as_released"])
@pytest.mark.parametrize(("method", "budget"), [("moefication", 2), ("factorllm", 2), ("lte", 0.5)])
def test_variants_run(method, budget, variant, overrides):
    _, record = run([*overrides, f"method={method}", f"method.variant={variant}", f"method.budgets=[{budget}]"])
    assert record["state"] == "done"
    assert (("prepared_dense", None) in arms(record)) == (method == "moefication")


def test_routed_methods_have_all_controls_at_each_budget(overrides):
    _, record = run([*overrides, "method=factorllm", "method.budgets=[1,4]"])
    controls = ("adapted", "learned_router", "oracle_router", "random_router", "all_blocks")
    assert arms(record) == {(arm, budget) for arm in controls for budget in (1.0, 4.0)}
    by_arm = {(point["arm"], point["budget"]): point["quality"]["nats_per_token"] for point in record["points"]}
    # With all four blocks on, who chose them cannot matter while they are still dense slices.
    assert by_arm["learned_router", 4.0] == pytest.approx(by_arm["oracle_router", 4.0], abs=1e-5)
    assert by_arm["random_router", 4.0] == pytest.approx(by_arm["oracle_router", 4.0], abs=1e-5)


def test_controls_can_be_left_out_and_added_later(overrides, capsys):
    few = [*overrides, "method=factorllm", "method.budgets=[1]"]
    _, record = run([*few, "controls=false"])
    assert arms(record) == {("adapted", 1.0), ("learned_router", 1.0)}
    capsys.readouterr()
    run(few)
    computed = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("computing")]
    assert [title.split("/")[0] for title in computed] == ["evaluate"] * 3


def test_a_second_run_computes_nothing_and_a_new_budget_only_what_it_needs(overrides, capsys):
    run([*overrides, "method=moefication", "method.budgets=[8]"])
    capsys.readouterr()
    folder, _ = run([*overrides, "method=moefication", "method.budgets=[8]"])
    assert "computing" not in capsys.readouterr().err
    run([*overrides, "method=moefication", "method.budgets=[8,16]"])
    computed = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("computing")]
    assert computed
    assert all("moefication-16" in title for title in computed)
    assert folder.is_dir()


def test_a_dry_run_lists_stages_and_leaves_nothing(overrides, tmp_path):
    config = strict_object(MoesaicConfig, compose_plain([*overrides, "method=factorllm", "dry_run=true"]))
    states = plan_experiment(config)
    assert {state.state for state in states} == {"missing"}
    assert {"backbone", "tokens", "calibrate", "convert", "adapt", "evaluate"} <= {
        s.title.split("/")[0] for s in states
    }
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.partition.num_blocks=24",
            r"method\.partition\.num_blocks=24 does not divide the FFN width 64.*16, 32",
        ),
        ("adapt.context=100", r"adapt\.context=100 exceeds the 64 positions"),
        ("bench=quick", r"bench: timing needs 256 positions.*but the model has 64"),
        ("backbone.path=/nowhere/model", r"/nowhere/model.*does not exist"),
        ("data.train=/nowhere/train.txt", r"cannot read /nowhere/train\.txt"),
    ],
)
def test_what_cannot_work_is_refused_before_any_stage_runs(override, message, overrides, tmp_path):
    with pytest.raises((ConfigError, ValueError), match=message):
        run([*overrides, "method=moefication", "method.budgets=[8]", "method.select.k=8", override])
    assert not list((tmp_path / "runs").rglob("config.json"))


@pytest.mark.parametrize("rule", ["greedy", "solved"])
@pytest.mark.parametrize("method", ["static_slice", "moefication", "cats"])
def test_an_allocation_keeps_the_mean_share_and_moves_it_between_layers(method, rule, overrides):
    blocks = {
        "static_slice": ["method.budgets=[2]"],
        "moefication": ["+method/blocks=b4", "method.budgets=[2]"],
        "cats": ["method.budgets=[0.75]"],  # of the gate's products all, of the others a quarter
    }
    _, record = run([*overrides, f"method={method}", *blocks[method], f"+method/allocate={rule}"])
    adapted = next(point for point in record["points"] if point["arm"] == "adapted")
    assert adapted["active_ffn_frac"] == pytest.approx(0.5, abs=0.05 if method == "cats" else 0.01)
    stages = {stage["stage"] for stage in record["stages"]}
    assert "allocate" in stages


def test_an_allocation_needs_budgets_that_are_shares(overrides):
    with pytest.raises(ConfigError, match=r"method\.allocate: the budgets of static_depth .* are no active shares"):
        run([*overrides, "method=static_depth", "+method/allocate=greedy"])


@pytest.mark.parametrize("method", ["dense", "static_slice", "factorllm"])
def test_cett_stands_beside_dense_and_adapted_points(method, overrides):
    cett = "++evaluate.cett={increases_pct:[1],fit_tokens:128,report_tokens:128}"
    _, record = run([*overrides, cett, f"method={method}"])
    for point in record["points"]:
        found = point["cett"]
        assert (set(found) == {"1"}) == (point["arm"] in ("adapted", "dense"))
        assert all(0 <= value["sparsity"] <= 1 for value in found.values())


def test_tokens_of_the_preparation_count_as_adaptation(overrides):
    _, record = run([*overrides, "method=moefication", "method.variant=as_published", "method.budgets=[8]"])
    phases = {phase["phase"]: phase for phase in record["adaptation"]["phases"]}
    assert set(phases) == {"prepare", "router"}
    assert record["adaptation"]["tokens"] == phases["prepare"]["tokens"] > 0
