import io
from pathlib import Path

import pytest
from report.synthetic_records import cell, point, record, write_record, write_runs, write_study
from rich.console import Console

from moesaic.report.load import load
from moesaic.report.results import analyse
from moesaic.report.terminal import print_results


def _printed(root: Path, width: int) -> list[str]:
    text = io.StringIO()
    print_results(Console(file=text, width=width), analyse(load(root)))
    return text.getvalue().splitlines()


def _small(root: Path) -> Path:
    speed = [cell("prefill", b, 512, 0, ratio=0.6 + b / 100, ideal=0.5) for b in (8, 1)]
    points = [point("adapted", 8, 2.0, active=0.25, speed=speed)]
    points.append(point("adapted", 4, 9.0, active=0.1, failure={"reason": "diverged", "message": "NaN"}))
    write_record(root, record("m", "synthetic-a", 0, points))
    write_record(root, record("dense", "synthetic-a", 0, [point("dense", None, 1.9, active=1.0)]))
    return root


def test_a_wide_terminal_has_one_line_per_point(tmp_path: Path) -> None:
    lines = _printed(_small(tmp_path), 130)
    (row,) = [line for line in lines if line.strip().startswith("m ")]
    # smallest batch: 0.61, its interval 3 % each way
    assert row.split() == ["m", "k=8", "25", "%", "7.389", "80", "%", "●", "0.61", "0.59–0.63", "0.50"]
    assert any("failed: m 4 (adapted, seed 0): diverged" in line for line in lines)
    assert any("prefill, batch 1, 512 tokens" in line for line in lines)


@pytest.mark.parametrize("width", [80, 100, 130, 200])
def test_no_number_is_cut_off(tmp_path: Path, width: int) -> None:
    lines = _printed(write_runs(tmp_path), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    # 3 methods x 3 budgets x 2 phases, each with its ideal ratio; dense and its twin have none
    assert text.count("–0.") + text.count("–1.") >= 18


def test_records_without_times_still_print(tmp_path: Path) -> None:
    write_record(tmp_path, record("m", "synthetic-a", 0, [point("adapted", 8, 2.0, active=0.25)]))
    assert any("Nothing was timed" in line for line in _printed(tmp_path, 120))


def test_a_time_below_the_ideal_is_marked(tmp_path: Path) -> None:
    speed = [cell("prefill", 1, 512, 0, ratio=0.4, ideal=0.5)]
    write_record(tmp_path, record("m", "synthetic-a", 0, [point("adapted", 8, 2.0, active=0.25, speed=speed)]))
    for width in (80, 130):
        text = " ".join(" ".join(_printed(tmp_path, width)).split())
        assert "!0.50" in text
        assert "an error to explain" in text


@pytest.mark.parametrize("width", [80, 120, 160])
def test_whether_routing_pays_is_printed(tmp_path: Path, width: int) -> None:
    lines = _printed(write_study(tmp_path, seeds=(0, 1), num_documents=5), width)
    assert max(map(len, lines)) <= width
    begin = next(i for i, line in enumerate(lines) if line.startswith("Does routing pay? Loss"))
    text = "\n".join(lines[begin:])
    assert "…" not in text
    assert all(verdict in text for verdict in ("pays", "does not", "can't tell"))
    together = " ".join(text.split())
    assert "Does routing pay? next_line accuracy" in together
    assert "No slice beside method_n_threshold: its active share 78 % lies outside the slices'" in together
    assert "Few documents (5): their 15 windows were resampled" in together


def test_a_missing_slice_is_said_once(tmp_path: Path) -> None:
    lines = _printed(_small(tmp_path), 130)
    assert not any("Does routing pay" in line for line in lines)
    assert [line for line in lines if "static slice" in line] == [
        "no static slice beside m: no static_slice was run on synthetic-a"
    ]
