"""Expert-Token Resonance from config to record: every variant, and inference modes that share the adapted model."""

from __future__ import annotations

import json

import pytest

from moesaic.app.compose import compose_plain
from moesaic.app.pipeline import run_experiment
from moesaic.app.schema import MoesaicConfig
from moesaic.config.strict import strict_object


def run(overrides: list[str]) -> dict:
    plain = compose_plain([*overrides, "method=expert_token_resonance"])
    return json.loads((run_experiment(strict_object(MoesaicConfig, plain), plain) / "record.json").read_text())


def adapted(record: dict, budget: float) -> dict:
    return next(point for point in record["points"] if (point["arm"], point["budget"]) == ("adapted", budget))


@pytest.mark.parametrize("variant", ["as_published", "locmoe", "tcr_only", "ecr_only", "loss_free"])
def test_variants_run(variant, overrides):
    budget = 1.0 if variant in ("as_published", "locmoe") else 4.0
    record = run([*overrides, f"method.variant={variant}", f"method.budgets=[{budget:g}]"])
    assert record["state"] == "done"
    assert record["method"]["variant"] == variant
    point = adapted(record, budget)
    share = budget / 8
    assert point["active_ffn_frac"] <= share + 0.01
    if variant in ("tcr_only", "loss_free", "ecr_only"):
        assert point["active_ffn_frac"] == pytest.approx(share, abs=0.01)


def test_inference_modes_share_the_adapted_model_and_controls_match_each(overrides, capsys):
    shares = {}
    for mode in ("threshold_ema", "no_drop", "prefix_causal", "batch_topc"):
        capsys.readouterr()
        record = run([*overrides, "method.budgets=[4]", f"method.select.eval_mode={mode}"])
        computed = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("computing")]
        assert any("adapt" in title for title in computed) == (mode == "threshold_ema")
        points = {point["arm"]: point for point in record["points"]}
        shares[mode] = points["adapted"]["active_ffn_frac"]
        assert points["oracle_router"]["active_ffn_frac"] == pytest.approx(shares[mode], abs=0.06)
        notes_L = points["adapted"]["routing"]["notes_L"]
        assert ("capacity_tokens" in notes_L) == (mode == "batch_topc")
        assert notes_L["kept_frac"] == pytest.approx([2 * f for f in points["adapted"]["routing"]["active_frac_L"]])
    assert shares["no_drop"] == 0.5
    assert all(share < 0.5 for mode, share in shares.items() if mode != "no_drop")
