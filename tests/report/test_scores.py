from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report.synthetic_records import document_rows

from moesaic.evaluate.items import best_option, margin
from moesaic.report.scores import LOSS, point_key, read_scores


def _write(folder: Path, name: str, frame: pd.DataFrame) -> None:
    frame.to_parquet(folder / name)


def test_losses_are_read_by_document_and_by_window(tmp_path: Path) -> None:
    frame = pd.concat([document_rows(nats, 3).assign(arm="adapted", budget=k) for nats, k in ((2.0, 8), (3.0, 16))])
    _write(tmp_path, "documents.parquet", frame)
    found = read_scores(tmp_path)
    assert set(found) == {("adapted", 8.0, LOSS), ("adapted", 16.0, LOSS)}
    losses = found["adapted", 8.0, LOSS]
    assert losses.mean == pytest.approx(2.0)
    assert losses.finer is not None
    assert losses.finer.mean == pytest.approx(2.0)
    assert (len(losses.unit_U), len(losses.finer.unit_U), losses.finer.weight_U.sum()) == (3, 9, 180)


def test_files_without_windows_and_in_another_order_still_pair(tmp_path: Path) -> None:
    rows = document_rows(2.0, 5, windows=False).assign(arm="dense", budget=None)
    _write(tmp_path, "documents.parquet", rows)
    one = read_scores(tmp_path)["dense", None, LOSS]
    assert one.finer is None
    _write(tmp_path, "documents.parquet", rows.iloc[::-1])
    other = read_scores(tmp_path)["dense", None, LOSS]
    assert one.unit_U.equals(other.unit_U)
    assert list(one.sum_U) == list(other.sum_U)


def test_documents_of_one_name_stay_apart(tmp_path: Path) -> None:
    rows = pd.DataFrame({"arm": "dense", "budget": None, "document": ["a", "a"], "nll": [1.0, 2.0], "tokens": [1, 1]})
    _write(tmp_path, "documents.parquet", rows)
    losses = read_scores(tmp_path)["dense", None, LOSS]
    assert losses.unit_U.is_unique
    assert list(losses.sum_U) == [1.0, 2.0]


def test_answers_equal_the_item_measures(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    options = [list(generator.normal(size=2 + i % 3)) for i in range(30)] + [[-1.0, -1.0], [-1.0, -1.0]]
    gold = [i % 2 for i in range(32)]
    frame = pd.DataFrame({"task": "t", "id": [f"{i:02d}" for i in range(32)], "gold": gold, "option_loglik": options})
    _write(tmp_path, "items.parquet", frame.assign(arm="adapted", budget=8.0))
    found = read_scores(tmp_path)
    expected = [float(best_option(values) == right) for values, right in zip(options, gold, strict=True)]
    assert list(found["adapted", 8.0, "t.acc"].sum_U) == expected
    assert 0 < sum(expected) < 32
    margins = [margin(values, right) for values, right in zip(options, gold, strict=True)]
    assert list(found["adapted", 8.0, "t.margin"].sum_U) == pytest.approx(margins)


def test_files_that_cannot_be_read_give_nothing(tmp_path: Path) -> None:
    assert read_scores(tmp_path) == {}
    (tmp_path / "documents.parquet").write_bytes(b"half of a fi")
    _write(tmp_path, "items.parquet", pd.DataFrame({"something": ["else"]}))
    assert read_scores(tmp_path) == {}


def test_a_budget_that_pandas_calls_missing_is_none() -> None:
    assert {point_key("a", value) for value in (None, float("nan"), pd.NA)} == {("a", None)}
    assert point_key("a", 8) == ("a", 8.0)
