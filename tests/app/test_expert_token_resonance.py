"""Expert-Token Resonance from config to record: variants, and modes of inference that share the adapted model."""

from __future__ import annotations

import json

import pytest

from moesaic.app.compose import compose_plain
from moesaic.app.pipeline import run_experiment
from moesaic.app.plan import Plan, Point
from moesaic.app.schema import MoesaicConfig
from moesaic.config.strict import strict_object


def configured(overrides: list[str]) -> tuple[MoesaicConfig, dict]:
    plain = compose_plain([*overrides, "method=expert_token_resonance"])
    return strict_object(MoesaicConfig, plain), plain


@pytest.mark.parametrize("variant", ["as_published", "locmoe", "ecr_only"])
def test_variants_run(variant, overrides):
    budget = 4.0 if variant == "ecr_only" else 1.0
    folder = run_experiment(
        *configured([*overrides, f"method.variant={variant}", f"method.budgets=[{budget:g}]", "seed=0"])
    )
    record = json.loads((folder / "record.json").read_text())
    assert record["state"] == "done"
    assert record["method"]["variant"] == variant
    points = {point["arm"]: point for point in record["points"]}
    share = points["adapted"]["active_ffn_frac"]
    assert points["random_router"]["active_ffn_frac"] == pytest.approx(share, abs=0.03)
    if variant == "ecr_only":
        assert share == pytest.approx(budget / 8, abs=0.01)
    else:
        notes_L = points["adapted"]["routing"]["notes_L"]
        assert share < budget / 8
        assert all(frac > 0 for frac in notes_L["tokens_kept_nowhere_frac"])
        assert all(tokens >= 1 for tokens in notes_L["capacity_tokens"])


def test_modes_of_inference_are_evaluated_apart_on_one_adapted_model(overrides):
    plans = [
        Plan(configured([*overrides, f"method.select.eval_mode={mode}"])[0])
        for mode in ("batch_topc", "no_drop", "threshold_ema", "prefix_causal")
    ]
    assert len({plan.adapted(4.0).identity for plan in plans}) == 1
    points = [Point(arm="adapted", budget=4.0, model=plan.adapted(4.0), timed=False) for plan in plans]
    assert len({plan.evaluation(point).identity for plan, point in zip(plans, points, strict=True)}) == 4
    other = Plan(configured([*overrides, "++method.select.capacity.rho=0.5"])[0])
    assert other.adapted(4.0).identity != plans[0].adapted(4.0).identity
