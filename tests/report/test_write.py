from pathlib import Path

import pandas as pd
import pytest
from report.synthetic_records import write_runs

from moesaic.report.columns import find_quality
from moesaic.report.load import LoadedRuns, load
from moesaic.report.write import write_report


@pytest.fixture
def runs(tmp_path: Path) -> LoadedRuns:
    return load(write_runs(tmp_path / "runs", seeds=(0,)))


def test_a_report_is_whole_and_its_table_reads_back(runs: LoadedRuns, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    files = write_report(runs, out, quality=find_quality("perplexity", runs.table.columns))
    assert sorted(path.name for path in out.iterdir()) == [
        "gaps.png", "pareto.png", "report.html", "table.csv", "table.parquet",
    ]  # fmt: skip
    back = pd.read_parquet(files.parquet)
    assert list(back.columns) == list(runs.table.columns)
    pd.testing.assert_series_equal(back["ratio"], runs.table["ratio"])
    assert len(pd.read_csv(files.csv)) == len(runs.table)


def test_the_same_records_give_the_same_page(runs: LoadedRuns, tmp_path: Path) -> None:
    quality = find_quality("perplexity", runs.table.columns)
    pages = [write_report(runs, tmp_path / name, quality=quality).page.read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]
