from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report.synthetic_records import point, record, write_record, write_runs, write_study

from moesaic.report.columns import find_quality
from moesaic.report.load import load
from moesaic.report.share_figure import draw_shares
from moesaic.report.summary import summarise_points


def _figure(root: Path) -> Figure:
    table = load(root).table
    return draw_shares(summarise_points(table), find_quality("nats_per_token", table.columns))


def test_every_method_is_drawn_and_named_once(tmp_path: Path) -> None:
    figure = _figure(write_study(tmp_path, seeds=(0, 1)))
    FigureCanvasAgg(figure).draw()
    names = [text.get_text() for text in figure.texts]
    assert len(names) == len(set(names)) == 15
    filled = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "None"]
    points = [line for line in filled if line.get_markerfacecolor() != "none"]
    oracles = [line for line in filled if line.get_markerfacecolor() == "none"]
    assert [len(line.get_xdata()) for line in points] == [3] * 15
    assert len(oracles) == 14 * 3
    boxes = [text.get_window_extent() for text in figure.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.axes[0].bbox.x0 for box in boxes)


def test_labels_stand_in_the_order_of_the_curves(tmp_path: Path) -> None:
    for number, nats in enumerate((2.3, 2.301, 2.9, 2.302)):
        points = [point("adapted", 8, nats, active=0.25), point("adapted", 16, 2.1, active=0.5)]
        write_record(tmp_path, record(f"m{number}", "synthetic-a", 0, points))
    figure = _figure(tmp_path)
    heights = {text.get_text(): text.get_position()[1] for text in figure.texts}
    assert heights["m0"] < heights["m1"] < heights["m3"] < heights["m2"]
    gaps = [b - a for a, b in pairwise(sorted(heights.values()))]
    assert min(gaps) == pytest.approx(gaps[0])  # the crowded ones stand one label's height apart
    assert gaps[-1] > gaps[0]


def test_an_oracle_beyond_the_picture_is_an_arrow_on_its_edge(tmp_path: Path) -> None:
    arms = {("adapted", 8): 2.3, ("adapted", 16): 2.1, ("oracle_router", 8): 9.0, ("oracle_router", 16): 2.2}
    points = [point(arm, budget, nats, active=budget / 32) for (arm, budget), nats in arms.items()]
    write_record(tmp_path, record("m", "synthetic-a", 0, points))
    axes = _figure(tmp_path).axes[0]
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "none"]
    found = {line.get_ydata()[0]: line.get_marker() for line in hollow}
    assert found[axes.get_ylim()[1]] == r"$\uparrow$"
    assert found[2.2] == "o"


def test_models_have_a_panel_each(tmp_path: Path) -> None:
    figure = _figure(write_runs(tmp_path, backbones=("synthetic-a", "synthetic-b")))
    assert [axes.get_title(loc="left").split(" · ")[0] for axes in figure.axes] == ["synthetic-a", "synthetic-b"]


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    write_record(tmp_path, record("dense", "synthetic-a", 0, [point("dense", None, 2.0, active=1.0)]))
    assert "No sparse point" in _figure(tmp_path).texts[0].get_text()
