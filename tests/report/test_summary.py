import math
from pathlib import Path

import pytest
from report.synthetic_records import cell, point, record, write_record

from moesaic.report.load import load
from moesaic.report.summary import deployed, failures, in_reading_order, mean_interval, summarise, summarise_points


def _timed(ratio: float, **more: object) -> dict:
    return cell("prefill", 1, 512, 0, ratio=ratio, ideal=0.5) | more


def test_interval_by_hand() -> None:
    # n = 3, mean 2, s = 1, t(0.975, 2) = 4.302653
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, high - mean, mean - low) == pytest.approx((2.0, 4.302653 / math.sqrt(3), 4.302653 / math.sqrt(3)))
    assert all(math.isnan(end) for end in mean_interval([1.0])[1:])


def test_means_over_seeds_by_hand(tmp_path: Path) -> None:
    for seed, (nats, ratio) in enumerate([(2.0, 0.6), (2.2, 0.7)]):
        points = [point("adapted", 8, nats, active=0.25, speed=[_timed(ratio)])]
        write_record(tmp_path, record("m", "synthetic-a", seed, points))
    (row,) = summarise(load(tmp_path).table).to_dict("records")
    assert (row["nats_per_token"], row["ratio"], row["seeds"]) == pytest.approx((2.1, 0.65, 2))
    assert row["perplexity"] == pytest.approx((math.exp(2.0) + math.exp(2.2)) / 2)
    # n = 2, s = 0.1 / sqrt 2, t(0.975, 1) = 12.706205
    assert row["ratio_high"] - row["ratio"] == pytest.approx(12.706205 * 0.05, rel=1e-5)
    assert row["ratio_interval_over"] == "seeds"


def test_one_seed_keeps_the_interval_of_its_timing(tmp_path: Path) -> None:
    points = [point("adapted", 8, 2.0, active=0.25, speed=[_timed(0.6)])]
    write_record(tmp_path, record("m", "synthetic-a", 0, points))
    (row,) = summarise(load(tmp_path).table).to_dict("records")
    assert (row["ratio_low"], row["ratio_high"]) == pytest.approx((0.6 * 0.97, 0.6 * 1.03))
    assert row["ratio_interval_over"] == "timing samples"
    assert math.isnan(row["perplexity_low"])


def test_control_timings_stand_beside_and_never_in_the_mean(tmp_path: Path) -> None:
    speed = [_timed(0.6), _timed(1.2, control="all_blocks"), _timed(0.1, control="balanced")]
    write_record(tmp_path, record("m", "synthetic-a", 0, [point("adapted", 8, 2.0, active=0.25, speed=speed)]))
    (row,) = summarise(load(tmp_path).table).to_dict("records")
    assert (row["ratio"], row["all_blocks_ratio"]) == (0.6, 1.2)


def test_a_point_timed_in_two_cells_counts_once_in_its_quality(tmp_path: Path) -> None:
    twice = [_timed(0.6), _timed(0.7, batch_size=8)]
    write_record(tmp_path, record("m", "synthetic-a", 0, [point("adapted", 8, 2.0, active=0.25, speed=twice)]))
    write_record(tmp_path, record("m", "synthetic-a", 1, [point("adapted", 8, 3.0, active=0.25, speed=[_timed(0.6)])]))
    (row,) = summarise_points(load(tmp_path).table).to_dict("records")
    assert row["nats_per_token"] == 2.5


def test_failed_points_are_listed_and_not_averaged(tmp_path: Path) -> None:
    failed = {"arm": "adapted", "budget": 8, "failure": {"reason": "diverged", "message": "NaN at step 3"}}
    write_record(tmp_path, record("m", "synthetic-a", 0, [failed, point("adapted", 16, 2.0, active=0.5)]))
    table = load(tmp_path).table
    assert list(summarise_points(table)["budget"]) == [16]
    (row,) = failures(table).to_dict("records")
    assert (row["budget"], row["failure_reason"], row["failure_message"]) == (8, "diverged", "NaN at step 3")


def test_a_router_that_is_adapted_later_is_not_deployed(tmp_path: Path) -> None:
    arms = [point(arm, 8, 2.0, active=0.25) for arm in ("learned_router", "adapted", "oracle_router", "random_router")]
    router_only = point("learned_router", 16, 2.0, active=0.5)
    write_record(tmp_path, record("m", "synthetic-a", 0, [*arms, router_only]))
    rows = deployed(summarise_points(load(tmp_path).table))
    assert sorted(zip(rows["arm"], rows["budget"], strict=True)) == [("adapted", 8), ("learned_router", 16)]


def test_reading_order_is_controls_first_then_widest_budget_first(tmp_path: Path) -> None:
    points = [point("adapted", k, 2.0, active=k / 32) for k in (8, 16)]
    for method in ("zeta", "alpha", "static_slice", "dense"):
        write_record(tmp_path, record(method, "synthetic-a", 0, points))
    rows = in_reading_order(summarise_points(load(tmp_path).table))
    assert list(zip(rows["label"], rows["budget"], strict=True))[::2] == [
        ("dense", 16), ("static_slice", 16), ("alpha", 16), ("zeta", 16),
    ]  # fmt: skip


def test_the_first_of_several_executors_counts(tmp_path: Path) -> None:
    speed = [_timed(0.6, executor="grouped"), _timed(0.3, executor="gather")]
    write_record(tmp_path, record("m", "synthetic-a", 0, [point("adapted", 8, 2.0, active=0.25, speed=speed)]))
    (row,) = summarise(load(tmp_path).table).to_dict("records")
    assert (row["ratio"], row["executor"]) == (0.6, "grouped")


def test_a_point_whose_timing_failed_keeps_its_quality(tmp_path: Path) -> None:
    failed = point("adapted", 8, 2.0, active=0.25, failure={"reason": "mismatch", "message": "outputs differ"})
    one = record("m", "synthetic-a", 0, [failed])
    write_record(tmp_path, {**one, "state": "failed"})
    table = load(tmp_path).table
    assert list(summarise_points(table)["nats_per_token"]) == [2.0]
    assert list(failures(table)["failure_reason"]) == ["mismatch"]
