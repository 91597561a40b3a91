import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report.synthetic_records import document_rows, item_rows, point, record, write_record, write_scores, write_study

from moesaic.report.load import load
from moesaic.report.pays import LOSES, OPEN, PAYS, PAYS_COLUMNS, pays_table, verdict

TOKENS = 1000


def _write(root: Path, method: str, arms: dict[tuple[str, float | None], tuple[float, float]], **more: Any) -> Path:
    """A record of (arm, budget) -> (loss, active share), and its documents and items."""
    seed, change, shape = more.pop("seed", 0), more.pop("change", {}), more.pop("shape", {})
    points = [point(arm, budget, nats, active=active) for (arm, budget), (nats, active) in arms.items()]
    one = record(method, "synthetic-a", seed, points, **{"tokens": TOKENS, **more}) | change
    folder = write_record(root, one)
    write_scores(folder, one, **shape)
    return folder


def _slices(root: Path, nats: tuple[float, ...] = (2.4, 2.2), **more: Any) -> None:
    arms = {("adapted", 8 * (i + 1)): (one, 0.25 * (i + 1)) for i, one in enumerate(nats)}
    _write(root, "static_slice", arms, **more)


def _rows(root: Path, measure: str = "nats_per_token") -> list[dict[Any, Any]]:
    table = pays_table(load(root), resamples=200)
    assert list(table.columns) == list(PAYS_COLUMNS)
    return table[table["measure"] == measure].to_dict("records")


def _row(root: Path, measure: str = "nats_per_token") -> dict[Any, Any]:
    (row,) = _rows(root, measure)
    return row


def test_a_point_by_hand(tmp_path: Path) -> None:
    _write(tmp_path, "m", {("adapted", 8): (2.3, 0.25), ("oracle_router", 8): (2.15, 0.25)})
    _slices(tmp_path)
    _write(tmp_path, "dense_same_tokens", {("adapted", None): (1.9, 1.0)})
    row = _row(tmp_path)
    expected = {
        "value": 2.3, "perplexity": math.exp(2.3), "slice": 2.4, "difference": -0.1, "oracle": 2.15,
        "oracle_difference": -0.25, "oracle_share_frac": 0.4, "dense_difference": 0.4, "slice_from_frac": 0.25,
        "slice_to_frac": 0.25, "paired_seeds": 1, "documents": 40, "resampled_count": 40,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert (row["interpolated"], row["resampled"], row["verdict"]) == (False, "documents", PAYS)
    assert row["difference_low"] < -0.1 < row["difference_high"] < 0
    assert row["dense_difference_low"] < 0.4 < row["dense_difference_high"]
    assert math.isnan(row["difference_seed_sd"])
    assert (row["reason"], row["dense_reason"], row["remarks"]) == ("", "", "")


def test_between_widths_the_slice_is_interpolated(tmp_path: Path) -> None:
    _write(tmp_path, "m", {("adapted", 8): (2.3, 0.3)})
    _slices(tmp_path)
    row = _row(tmp_path)
    assert row["slice"] == pytest.approx(2.4 - 0.2 * 0.2)
    assert (row["interpolated"], row["slice_from_frac"], row["slice_to_frac"]) == (True, 0.25, 0.5)


def _other_protocol(folder: Path) -> None:
    path = folder / "record.json"
    changed = json.loads(path.read_text())
    changed["protocol"]["perplexity"]["context"] = 1024
    path.write_text(json.dumps(changed))


@pytest.mark.parametrize(
    ("slices", "reason"),
    [
        (None, "no static_slice was run on synthetic-a"),
        ({"nats": (2.4,)}, "lies outside the slices' (25 %)"),
        ({"tokens": 400}, "static_slice was adapted on 400 tokens, this on 1,000"),
        ({"seed": 7}, "no static_slice was run with seed 0"),
        ({"shape": {"num_documents": 39}}, "scored on other documents"),
    ],
)
def test_without_an_equal_slice_there_is_a_reason_and_no_number(
    tmp_path: Path, slices: dict[str, Any] | None, reason: str
) -> None:
    _write(tmp_path, "m", {("adapted", 8): (2.3, 0.4)})
    if slices is not None:
        _slices(tmp_path, **slices)
    row = _row(tmp_path)
    assert reason in row["reason"]
    assert pd.isna(row["slice"])
    assert pd.isna(row["difference"])
    assert pd.isna(row["verdict"])
    assert row["value"] == 2.3


def test_another_protocol_is_refused(tmp_path: Path) -> None:
    _other_protocol(_write(tmp_path, "m", {("adapted", 8): (2.3, 0.25)}))
    _slices(tmp_path)
    assert _row(tmp_path)["reason"] == "static_slice was measured under another protocol (context: 256, here 1024)"


def test_records_without_documents_are_said(tmp_path: Path) -> None:
    folder = _write(tmp_path, "m", {("adapted", 8): (2.3, 0.25)})
    _slices(tmp_path)
    (folder / "documents.parquet").unlink()
    assert _row(tmp_path)["reason"] == "it has no nats_per_token per document or item"


def test_seeds_are_paired_and_their_spread_stands_apart(tmp_path: Path) -> None:
    for seed, (own, sliced) in enumerate([(2.30, 2.40), (2.35, 2.42), (2.28, 2.43)]):
        _write(tmp_path, "m", {("adapted", 8): (own, 0.25)}, seed=seed)
        _slices(tmp_path, (sliced, sliced - 0.2), seed=seed)
    row = _row(tmp_path)
    differences = [-0.10, -0.07, -0.15]
    assert row["difference"] == pytest.approx(np.mean(differences))
    assert row["difference_seed_sd"] == pytest.approx(np.std(differences, ddof=1))
    assert (row["seeds"], row["paired_seeds"]) == (3, 3)
    # The interval is of the mean over seeds of each document's difference, not of three times as many documents.
    assert row["documents"] == row["resampled_count"] == 40


def test_a_seed_without_a_slice_stays_out_and_is_said(tmp_path: Path) -> None:
    for seed in (0, 1):
        _write(tmp_path, "m", {("adapted", 8): (2.3 + seed, 0.25)}, seed=seed)
    _slices(tmp_path, seed=0)
    row = _row(tmp_path)
    assert row["difference"] == pytest.approx(-0.1)
    assert row["remarks"] == "1 of 2 seeds have a slice (no static_slice was run with seed 1)"


def test_few_documents_are_resampled_by_window(tmp_path: Path) -> None:
    _write(tmp_path, "m", {("adapted", 8): (2.3, 0.25)}, shape={"num_documents": 5})
    _slices(tmp_path, shape={"num_documents": 5})
    row = _row(tmp_path)
    assert (row["documents"], row["resampled"], row["resampled_count"]) == (5, "windows", 15)
    # A slice of before windows were kept: its documents are still comparable.
    (folder,) = (tmp_path / "record").glob("static_slice-*")
    documents = [document_rows(nats, 5, windows=False) for nats in (2.4, 2.2)]
    frame = pd.concat([one.assign(arm="adapted", budget=k) for one, k in zip(documents, (8, 16), strict=True)])
    frame.to_parquet(folder / "documents.parquet")
    row = _row(tmp_path)
    assert (row["resampled"], row["resampled_count"]) == ("documents", 5)
    assert row["difference"] == pytest.approx(-0.1)


def test_task_answers_are_compared_item_by_item(tmp_path: Path) -> None:
    _write(tmp_path, "m", {("adapted", 8): (2.2, 0.25)})
    _slices(tmp_path)
    accuracy, margin = _row(tmp_path, "next_line.acc"), _row(tmp_path, "next_line.margin")
    own, sliced = (item_rows(nats, 300) for nats in (2.2, 2.4))
    right = [
        np.mean([(loglik[1] > loglik[0]) == gold for loglik, gold in zip(*columns, strict=True)])
        for columns in ((rows["option_loglik"], rows["gold"]) for rows in (own, sliced))
    ]
    assert (accuracy["value"], accuracy["slice"]) == pytest.approx(tuple(right))
    assert accuracy["difference"] == pytest.approx(right[0] - right[1])
    assert (accuracy["resampled"], accuracy["documents"], accuracy["verdict"]) == ("items", 300, PAYS)
    assert margin["difference"] == pytest.approx(0.4, abs=0.1)
    assert margin["verdict"] == PAYS
    assert pd.isna(accuracy["perplexity"])


@pytest.mark.parametrize(
    ("low", "high", "by_seed", "expected"),
    [
        (-0.3, -0.1, [-0.2, -0.1], (PAYS, LOSES)),
        (0.1, 0.3, [0.2], (LOSES, PAYS)),
        (-0.1, 0.1, [0.01], (OPEN, OPEN)),
        (0.0, 0.1, [0.01], (OPEN, OPEN)),
        (-0.3, -0.1, [-0.5, 0.1], (OPEN, OPEN)),  # the seeds disagree
        (math.nan, math.nan, [-0.2], (OPEN, OPEN)),
    ],
)
def test_the_verdict(low: float, high: float, by_seed: list[float], expected: tuple[str, str]) -> None:
    assert tuple(verdict(low, high, by_seed, lower_is_better=lower) for lower in (True, False)) == expected


def test_an_oracle_without_a_clear_lead_gives_no_share(tmp_path: Path) -> None:
    _write(tmp_path, "m", {("adapted", 8): (2.3, 0.25), ("oracle_router", 8): (2.5, 0.25)})
    _slices(tmp_path)
    row = _row(tmp_path)
    assert row["oracle_difference"] == pytest.approx(0.1)
    assert pd.isna(row["oracle_share_frac"])


def test_the_oracle_of_some_seeds_is_compared_within_them(tmp_path: Path) -> None:
    _write(tmp_path, "m", {("adapted", 8): (2.3, 0.25), ("oracle_router", 8): (2.15, 0.25)}, seed=0)
    _write(tmp_path, "m", {("adapted", 8): (2.2, 0.25)}, seed=1)
    for seed in (0, 1):
        _slices(tmp_path, seed=seed)
    row = _row(tmp_path)
    assert row["difference"] == pytest.approx(-0.15)
    assert (row["oracle"], row["oracle_difference"]) == (pytest.approx(2.15), pytest.approx(-0.25))
    assert row["oracle_share_frac"] == pytest.approx(0.4)


def test_what_adapting_cost(tmp_path: Path) -> None:
    def cost(seconds: float, peak: int, tokens: list[int]) -> dict[str, Any]:
        stages = [
            {"stage": "adapt", "identity": f"{seconds}-{i}", "wall_seconds": seconds, "peak_rss_bytes": peak + i}
            for i in range(2)
        ]
        phases = [{"phase": "routers", "tokens": 0}, *({"phase": "finetune", "tokens": count} for count in tokens)]
        adaptation = {"tokens": TOKENS, "steps": 1, "wall_seconds": 0.0, "phases": phases}
        return {"stages": stages, "adaptation": adaptation}

    _write(tmp_path, "m", {("adapted", 8): (2.3, 0.25)}, change=cost(30.0, 7, [TOKENS] * 3))
    _write(tmp_path, "dense_same_tokens", {("adapted", None): (1.9, 1.0)}, change=cost(5.0, 3, [TOKENS]))
    row = _row(tmp_path)
    assert (row["adaptation_tokens"], row["adaptation_wall_seconds"], row["adaptation_peak_rss_bytes"]) == (1000, 60, 8)
    assert row["adaptation_time_ratio"] == pytest.approx((60 / 3000) / (10 / 1000))


def test_a_prepared_dense_model_is_remarked(tmp_path: Path) -> None:
    stages = [{"stage": "prepare", "identity": "p"}, {"stage": "adapt", "identity": "a"}]
    _write(tmp_path, "m", {("adapted", 8): (2.3, 0.25)}, change={"stages": stages})
    assert "dense model was changed before the cut" in _row(tmp_path)["remarks"]


def test_a_study_of_fourteen_methods(tmp_path: Path) -> None:
    rows = _rows(write_study(tmp_path, seeds=(0, 1), num_documents=12))
    assert len(rows) == 14 * 3
    assert not {"dense", "dense_same_tokens", "static_slice"} & {row["method"] for row in rows}
    assert {row["verdict"] for row in rows if not pd.isna(row["verdict"])} == {PAYS, LOSES, OPEN}
    (outside,) = [row for row in rows if pd.isna(row["slice"])]
    assert "78 %" in outside["reason"]


@pytest.mark.parametrize(
    "damage",
    [{"adaptation": None}, {"adaptation": {"phases": [3]}}, {"stages": [None, {"stage": 3}]}, {"protocol": {}}],
)
def test_parts_that_are_missing_do_not_stop_the_report(tmp_path: Path, damage: dict[str, Any]) -> None:
    _write(tmp_path, "m", {("adapted", 8): (2.3, 0.25)}, change=damage)
    _slices(tmp_path)
    assert _row(tmp_path)["value"] == 2.3
