"""What the ready ablations of DynaMoE exchange runs from config to record on the toy."""

import pytest
from app.test_experiments import run


@pytest.mark.parametrize(
    ("changes", "budgets"),
    [
        (["+method/policy=cdf"], [0.25, 0.5, 0.75]),
        (["+method/policy=epr"], [0.25, 0.5, 0.75]),
        (["+method/policy=histogram"], [0.25, 0.5, 0.75]),
        (["+method/policy=static"], [2, 4, 6]),
        (["method.variant=as_published", "method.phases.finetune.theta=0.5"], [None]),
        (["experiment=mone_dispatch", "method.phases.finetune.router_weight=0.0"], [0.5]),
        (
            ["method.partition.num_blocks=2", "method.score.levels=geometric", "method.budgets=[0.75]"],
            [0.75],
        ),
        (["method.phases.finetune.dispatch=soft", "method.combine.by=prob", "method.budgets=[0.5]"], [0.5]),
    ],
)
def test_from_config_to_record(changes, budgets, overrides):
    _, record = run([*overrides, "method=dynamoe", *changes])
    assert record["state"] == "done"
    adapted = [point for point in record["points"] if point["arm"] == "adapted"]
    assert [point["budget"] for point in adapted] == budgets
    facts = {fact["phase"]: fact for fact in record["adaptation"]["phases"]}
    assert record["adaptation"]["tokens"] == facts["finetune"]["tokens"] == 2 * 2 * 32
    for solved in facts.get("shares", {}).get("shares", []):
        assert solved["realised"] == pytest.approx(solved["wanted"], abs=0.05)
