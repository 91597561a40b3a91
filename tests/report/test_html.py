import json
import re
from pathlib import Path
from typing import Any

import pytest
from report.synthetic_records import point, record, write_record, write_runs, write_study

from moesaic.report.front import ReferencePoint
from moesaic.report.html import render
from moesaic.report.load import load
from moesaic.report.results import analyse


def _page(root: Path) -> str:
    return render(analyse(load(root), reference=ReferencePoint(1.5, 1.1)))


def _data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _page(write_runs(tmp_path_factory.mktemp("runs"), backbones=("synthetic-a", "synthetic-b")))


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    without_plotly = re.sub(r'id="plotly">[^<]*<', "<", page)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", without_plotly)
    assert "https://" not in without_plotly
    assert page.count('id="plotly"') == 1
    assert len(page) < 2_500_000


def test_the_page_holds_every_point_of_every_front(page: str) -> None:
    data = _data(page)
    assert data["settings"] == ["synthetic-a", "synthetic-b"]
    assert len(data["cells"]) == 2 * 4
    for cell in data["cells"]:
        timed = [entry for entry in data["points"] if entry["cell"] == cell["id"]]
        assert len(timed) == 1 + 1 + 3 * 3
        assert any(entry["quality"]["perplexity"]["on_front"] for entry in timed)
    assert all(mark.keys() == {"light", "dark", "symbol"} for mark in data["styles"].values())
    assert set(data["styles"]) >= {entry["label"] for entry in data["points"]}
    assert len(data["volumes"]) == len(data["cells"]) * len(data["qualities"])
    assert "1.5×" in data["reference"]


def test_names_from_records_cannot_break_the_page(tmp_path: Path) -> None:
    nasty = "</script><b onload=x>&\u2028'\""
    failed = point("adapted", 8, 2.0, active=0.25, failure={"reason": nasty, "message": nasty})
    one = record(nasty, nasty, 0, [failed, point("adapted", 16, 2.0, active=0.5)])
    one["protocol"] |= {nasty: nasty}
    one["study"] = nasty
    folder = write_record(tmp_path, {**one, "method": {**one["method"], "name": "m"}})
    text = json.loads((folder / "record.json").read_text())
    text["method"]["name"] = nasty
    (folder / "record.json").write_text(json.dumps(text))
    page = _page(tmp_path)
    assert nasty not in page
    assert "<b onload" not in page
    assert _data(page)["points"][0]["label"] == nasty


def test_what_failed_or_was_skipped_is_on_the_page(tmp_path: Path) -> None:
    failed = point("adapted", 8, 2.0, active=0.25, failure={"reason": "out_of_memory", "message": "8 GiB asked"})
    write_record(tmp_path, record("m", "synthetic-a", 4, [failed, point("adapted", 16, 2.0, active=0.5)]))
    (tmp_path / "record" / "torn").mkdir()
    (tmp_path / "record" / "torn" / "record.json").write_text("{")
    page = _page(tmp_path)
    assert "m 8, adapted, seed 4 on synthetic-a: out_of_memory. 8 GiB asked" in page
    assert "record/torn/record.json: not readable as JSON" in page


def test_gap_table_shows_missing_as_missing(tmp_path: Path) -> None:
    write_record(tmp_path, record("m", "synthetic-a", 0, [point("adapted", 8, 2.25, active=0.25)]))
    page = _page(tmp_path)
    table = page[page.index('aria-label="Gaps"') :]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table[: table.index("</table>")])
    assert cells[:3] == ["m", "k=8", "25 %"]
    assert cells.count("—") == 7 + 5  # every rung but `adapted`, every gap; nothing was prepared
    assert "2.250" in cells


def test_whether_routing_pays_stands_in_the_page(tmp_path: Path) -> None:
    page = _page(write_study(tmp_path, seeds=(0, 1), num_documents=5))
    for text in (
        "Does routing pay?",
        '<span class="onfront">pays</span>',
        '<span class="loses">does not</span>',
        "between 25–50 %",
        "no slice: its active share 78 % lies outside the slices",
        "Few documents (5): their 15 windows were resampled",
        "What adapting cost",
        'href="pays.csv"',
    ):
        assert text.replace("'", "&#x27;") in page
    assert 'href="pareto.png"' not in page  # nothing was timed
    data = _data(page)
    assert data["cells"] == []
    assert len(data["oracles"]) == 14 * 3
    assert all(entry["cell"] is None for entry in data["points"])
