from pathlib import Path

import pandas as pd
import pytest
from report.synthetic_records import point, record, write_record, write_runs

from moesaic.report.load import load
from moesaic.report.results import Results, analyse
from moesaic.report.write import write_report


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return analyse(load(write_runs(tmp_path / "runs", seeds=(0,))))


def test_a_report_is_whole_and_its_table_reads_back(results: Results, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    files = write_report(results, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "gaps.png", "pareto.png", "pays.csv", "pays.parquet", "report.html", "share.png", "table.csv", "table.parquet",
    ]  # fmt: skip
    assert list(pd.read_parquet(files.pays).columns) == list(results.pays.columns)
    assert len(pd.read_csv(files.pays_csv)) == len(results.pays) == 2 * 3
    back = pd.read_parquet(files.parquet)
    assert list(back.columns) == list(results.runs.table.columns)
    pd.testing.assert_series_equal(back["ratio"], results.runs.table["ratio"])
    assert len(pd.read_csv(files.csv)) == len(results.runs.table)


def test_the_same_records_give_the_same_page(results: Results, tmp_path: Path) -> None:
    pages = [write_report(results, tmp_path / name).page.read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_without_times_there_is_no_front_and_no_old_one_stays(tmp_path: Path) -> None:
    points = [point("adapted", 8, 2.1, active=0.25)]
    write_record(tmp_path / "runs", record("m", "synthetic-a", 0, points))
    out = tmp_path / "out"
    out.mkdir()
    (out / "pareto.png").write_bytes(b"of an earlier report")
    files = write_report(analyse(load(tmp_path / "runs")), out)
    assert files.pareto is None
    assert not (out / "pareto.png").exists()
    assert files.shares.read_bytes().startswith(b"\x89PNG")
    assert "pareto.png" not in files.page.read_text()
