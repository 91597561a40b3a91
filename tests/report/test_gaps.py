import math
from pathlib import Path
from typing import Any

import pytest
from report.synthetic_records import point, record, write_record, write_runs

from moesaic.report.columns import find_quality
from moesaic.report.gaps import GAPS, gap_table, visible_limit
from moesaic.report.load import load


def _table(root: Path) -> list[dict[Any, Any]]:
    table = load(root).table
    return gap_table(table, find_quality("nats_per_token", table.columns)).to_dict("records")


def _ladder(root: Path, *, seed: int = 0, shift: float = 0.0, tokens: int = 1000) -> None:
    arms = {"oracle_router": 2.1, "learned_router": 2.6, "adapted": 2.25, "random_router": 4.0}
    points = [point(arm, 8, nats + shift, active=0.25) for arm, nats in arms.items()]
    write_record(root, record("m", "synthetic-a", seed, points, tokens=tokens))


def _control(root: Path, method: str, nats: float, *, active: float = 1.0, tokens: int = 1000, seed: int = 0) -> None:
    arm, budget = ("dense", None) if method == "dense" else ("adapted", 8 if method == "static_slice" else None)
    points = [point(arm, budget, nats, active=active)]
    write_record(root, record(method, "synthetic-a", seed, points, tokens=tokens))


def test_gaps_by_hand(tmp_path: Path) -> None:
    _ladder(tmp_path)
    _control(tmp_path, "dense", 2.0)
    _control(tmp_path, "dense_same_tokens", 1.9)
    _control(tmp_path, "static_slice", 2.4, active=0.25)
    (row,) = _table(tmp_path)
    expected = {
        "partition_gap": 2.1 - 2.0,
        "router_gap": 2.6 - 2.1,
        "adaptation_gap": 2.25 - 2.6,
        "dense_tokens_gap": 2.25 - 1.9,
        "routing_gain": 2.4 - 2.25,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert math.isnan(row["prepare_gap"])  # nothing was prepared
    # The ladder adds up: dense + the three steps = adapted.
    steps = row["partition_gap"] + row["router_gap"] + row["adaptation_gap"]
    assert row["dense"] + steps == pytest.approx(row["adapted"])
    assert row["notes"] == ""
    assert row["random_router"] == 4.0


def test_what_was_not_measured_is_missing(tmp_path: Path) -> None:
    write_record(tmp_path, record("m", "synthetic-a", 0, [point("learned_router", 8, 2.6, active=0.25)]))
    _control(tmp_path, "static_slice", 2.4, active=0.5)  # another width does not count
    (row,) = _table(tmp_path)
    assert row["learned_router"] == 2.6
    for name in ("dense", "oracle_router", "adapted", "dense_same_tokens", "static_slice"):
        assert math.isnan(row[name])
    assert all(math.isnan(row[gap.name]) for gap in GAPS)


def test_a_method_that_trains_nothing_after_is_held_against_the_slice(tmp_path: Path) -> None:
    write_record(tmp_path, record("m", "synthetic-a", 0, [point("learned_router", 8, 2.6, active=0.25)], tokens=1000))
    _control(tmp_path, "static_slice", 2.4, active=0.26)
    (row,) = _table(tmp_path)
    assert row["routing_gain"] == pytest.approx(-0.2)


def test_controls_of_other_length_are_named(tmp_path: Path) -> None:
    _ladder(tmp_path, tokens=1_000)
    _control(tmp_path, "dense_same_tokens", 1.9, tokens=5_000)
    (row,) = _table(tmp_path)
    assert row["notes"] == "dense_same_tokens was trained on 5,000 tokens, this on 1,000"


def test_the_control_with_the_same_tokens_is_taken(tmp_path: Path) -> None:
    _ladder(tmp_path, tokens=1_000)
    for seed, (nats, tokens) in enumerate([(1.7, 5_000), (1.9, 1_000)]):
        points = [point("adapted", None, nats, active=1.0)]
        control = record("dense_same_tokens", "synthetic-a", seed, points, tokens=tokens, fit={"steps": tokens})
        write_record(tmp_path, control)
    (row,) = _table(tmp_path)
    assert row["dense_same_tokens"] == 1.9
    assert row["notes"] == ""


def test_intervals_are_of_differences_within_a_seed(tmp_path: Path) -> None:
    # The whole ladder moves with the seed, so the router gap does not scatter at all although its rungs do.
    for seed, shift in enumerate((0.0, 0.3, -0.1)):
        _ladder(tmp_path, seed=seed, shift=shift)
    _control(tmp_path, "dense", 2.0, seed=0)
    (row,) = _table(tmp_path)
    assert (row["router_gap_low"], row["router_gap_high"]) == pytest.approx((0.5, 0.5))
    assert math.isnan(row["partition_gap_low"])  # dense has one seed, the oracle three: not paired
    assert row["seeds"] == 3


def test_each_model_has_its_own_dense(tmp_path: Path) -> None:
    rows = _table(write_runs(tmp_path, backbones=("synthetic-b", "synthetic-a")))
    assert {(row["model"], row["dense"]) for row in rows} == {("synthetic-b", 2.0), ("synthetic-a", 3.0)}
    assert {row["method"] for row in rows} == {"moefication", "factorllm"}


def test_pictures_cut_an_untrained_router_off(tmp_path: Path) -> None:
    _ladder(tmp_path)
    _control(tmp_path, "dense", 2.0)
    table = load(tmp_path).table
    quality = find_quality("nats_per_token", table.columns)
    gaps = gap_table(table, quality)
    # losses of the rungs meant to be good: 0.1 and 0.25, median 0.175
    assert visible_limit(gaps, quality) == pytest.approx(2.0 + 4 * 0.175)
    assert math.isnan(visible_limit(gaps.drop(columns="random_router").assign(random_router=2.3), quality))


def test_a_prepared_dense_model_is_a_rung_of_its_own(tmp_path: Path) -> None:
    arms = {"oracle_router": 2.3, "adapted": 2.4}
    points = [point(arm, 8, nats, active=0.25) for arm, nats in arms.items()]
    points.append(point("prepared_dense", None, 2.2, active=1.0))
    write_record(tmp_path, record("m", "synthetic-a", 0, points))
    _control(tmp_path, "dense", 2.0)
    (row,) = _table(tmp_path)
    assert (row["prepare_gap"], row["partition_gap"]) == pytest.approx((0.2, 0.1))
