import json
from pathlib import Path

import pandas as pd
import pytest
from report.synthetic_records import CELLS, cell, point, record, write_record, write_runs

from moesaic.report.columns import COLUMNS, find_quality
from moesaic.report.facts import shared_facts, stage_costs
from moesaic.report.front import fronts
from moesaic.report.load import NoRecordsError, load
from moesaic.runs.record import RECORD_FILE, read_record


@pytest.fixture
def dense() -> dict:
    return record("dense", "synthetic-a", 0, [point("dense", None, 2.0, active=1.0)])


def test_one_row_per_point_and_speed_cell(tmp_path: Path) -> None:
    table = load(write_runs(tmp_path, seeds=(0, 1))).table
    # dense and dense_same_tokens: 1 row each; static_slice: 3 budgets; the others: 3 budgets x 4 arms, adapted is timed
    timed = 3 * len(CELLS) * 2
    assert len(table) == 2 * (1 + 1 + timed + 2 * (timed + 3 * 3))
    assert not table.duplicated(["identity", "arm", "budget", "phase", "batch_size", "control"]).any()
    documented = {column.name for column in COLUMNS}
    assert {name for name in table.columns if not name.startswith("task.")} == documented


def test_values_arrive_in_their_columns(tmp_path: Path) -> None:
    speed = cell("decode", 8, 32, 128, ratio=0.5, ideal=0.25)
    write_record(
        tmp_path, record("m", "synthetic-a", 3, [point("adapted", 8, 2.0, active=0.25, speed=[speed])], tokens=70)
    )
    row = load(tmp_path).table.iloc[0]
    assert (row["seed"], row["budget"], row["phase"], row["batch_size"], row["context_tokens"]) == (
        3,
        8,
        "decode",
        8,
        128,
    )
    assert row["captured_share_frac"] == pytest.approx((1 - 0.5) / (1 - 0.25))
    assert row["sparse_ms"] / row["dense_ms"] == pytest.approx(0.5)
    assert row["perplexity"] == pytest.approx(2.718281828**2)
    assert (row["adaptation_tokens"], row["machine"]) == (70, "Synthetic CPU, 2 threads, float32")
    assert row["task.next_line.acc_frac"] == pytest.approx(0.8)


def test_synthetic_records_are_what_moesaic_writes(tmp_path: Path) -> None:
    write_runs(tmp_path, seeds=(0,))
    for path in tmp_path.rglob(RECORD_FILE):
        assert read_record(path.parent).points


def test_seeds_share_a_configuration_and_settings_do_not(tmp_path: Path) -> None:
    for seed in (0, 1):
        for rows in ("gate", "up"):
            points = [point("adapted", 8, 2.0, active=0.25)]
            write_record(tmp_path, record("m", "synthetic-a", seed, points, partition={"rows": rows, "seed": seed}))
    table = load(tmp_path).table
    assert table.groupby("label")["seed"].apply(set).to_dict() == {"m (rows=gate)": {0, 1}, "m (rows=up)": {0, 1}}
    assert table["configuration"].nunique() == 2


def test_whole_records_are_read_while_others_are_not_whole(tmp_path: Path, dense: dict) -> None:
    good = write_record(tmp_path, dense)
    bad = {
        "cut": '{"schema_version": 1, "na',
        "foreign": '{"hello": 1}',
        "newer": json.dumps({**dense, "schema_version": 99}),
        "running": json.dumps({**dense, "identity": "x", "state": "running"}),
        "typed": json.dumps({**dense, "identity": "y", "points": [{"arm": "dense", "active_ffn_frac": "all"}]}),
        "nameless": json.dumps({key: value for key, value in dense.items() if key != "identity"}),
        "zz-copy": json.dumps(dense),
        "dense-1.partial": json.dumps({**dense, "identity": "z"}),
        "qwen2.5-0b5-12": json.dumps({**dense, "identity": "w"}),
    }
    for name, text in bad.items():
        (tmp_path / "record" / name).mkdir()
        (tmp_path / "record" / name / "record.json").write_text(text)
    runs = load(tmp_path)
    reasons = {entry.path.parent.name: entry.reason for entry in runs.skipped}
    assert {experiment.folder.name for experiment in runs.experiments} == {good.name, "qwen2.5-0b5-12"}
    assert reasons["zz-copy"] == f"same experiment as {good}"
    assert "JSON" in reasons["cut"]
    assert "no schema_version" in reasons["foreign"]
    assert "99; this moesaic reads 1" in reasons["newer"]
    assert "'running'" in reasons["running"]
    assert reasons["typed"] == "points[0].active_ffn_frac is 'all'; a number is needed"
    assert reasons["nameless"] == "identity is missing"
    assert "half-written" in reasons["dense-1.partial"]


def test_failed_stages_are_told_with_their_own_words(tmp_path: Path, dense: dict) -> None:
    write_record(tmp_path, dense)
    folder = tmp_path / "adapt" / "moefication-0123.partial"
    folder.mkdir(parents=True)
    status = {
        "state": "failed", "stage": "adapt", "identity": "0123", "version": 1, "started_utc": "", "updated_utc": "",
        "reason": "diverged", "message": "loss is NaN at step 7", "host": "h", "pid": 1, "code_revision": "r",
    }  # fmt: skip
    (folder / "status.json").write_text(json.dumps(status))
    (failed,) = load(tmp_path).failed_stages
    assert (failed.path, failed.reason) == (folder, "diverged: loss is NaN at step 7")


def test_no_folder_and_no_records_are_different_errors(tmp_path: Path) -> None:
    with pytest.raises(NoRecordsError, match="is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(NoRecordsError, match=r"no record\.json under"):
        load(tmp_path)
    (tmp_path / "record.json").write_text("[]")
    with pytest.raises(NoRecordsError, match=r"no usable record.*\n.*no schema_version"):
        load(tmp_path)


def test_documents_and_items_are_read_on_demand(tmp_path: Path, dense: dict) -> None:
    folder = write_record(tmp_path, dense)
    runs = load(tmp_path)
    assert runs.documents().empty
    pd.DataFrame({"arm": ["dense"], "document": ["a"], "nll": [3.0], "tokens": [2]}).to_parquet(
        folder / "documents.parquet"
    )
    documents = runs.documents()
    assert documents.loc[0, "experiment"] == dense["name"]
    assert documents.loc[0, "nll"] == 3.0


def test_points_without_quality_or_speed_are_kept(tmp_path: Path) -> None:
    failed = {"arm": "adapted", "budget": 4, "failure": {"reason": "out_of_memory", "message": "no room"}}
    write_record(tmp_path, record("m", "synthetic-a", 0, [failed]))
    row = load(tmp_path).table.iloc[0]
    assert (row["failure_reason"], row["failure_message"]) == ("out_of_memory", "no room")
    assert pd.isna(row["perplexity"])
    assert pd.isna(row["phase"])


def test_no_single_wrong_value_stops_the_report(tmp_path: Path) -> None:
    """Every value of a record, at any depth, replaced by values of other kinds: read or named, never an exception."""
    speed = [cell("decode", 1, 32, 128, ratio=0.5, ideal=0.25)]
    good = record("m", "synthetic-a", 0, [point("adapted", 8, 2.0, active=0.25, speed=speed)])
    write_record(tmp_path, good)
    written = 0
    for path in _paths(good):
        for junk in (None, "x", 3, [], {}, [1], True):
            damaged = json.loads(json.dumps(good))
            damaged["identity"] = f"damaged-{written}"
            _put(damaged, path, junk)
            folder = tmp_path / f"damaged-{written}"
            folder.mkdir()
            (folder / "record.json").write_text(json.dumps(damaged))
            written += 1
    runs = load(tmp_path)
    assert len(runs.experiments) + len(runs.skipped) == written + 1
    assert len(runs.skipped) > written / 4
    assert not fronts(runs.table, find_quality("perplexity", runs.table.columns), resamples=2).empty
    assert shared_facts(runs.experiments, "environment") != []
    assert stage_costs(runs.experiments)["wall_seconds"].notna().all()


def _paths(node: object, path: tuple = ()) -> list[tuple]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, child in children for found in [(*path, key), *_paths(child, (*path, key))]]


def _put(node: dict, path: tuple, value: object) -> None:
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
