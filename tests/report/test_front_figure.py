from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from report.synthetic_records import cell, point, record, write_record, write_runs

from moesaic.report.canvas import save_png
from moesaic.report.columns import find_quality
from moesaic.report.front import fronts
from moesaic.report.front_figure import draw_fronts, visible_range
from moesaic.report.gap_figure import draw_gaps
from moesaic.report.gaps import gap_table
from moesaic.report.load import load


def test_one_panel_per_cell_with_every_candidate_and_the_front(tmp_path: Path) -> None:
    table = load(write_runs(tmp_path)).table
    quality = find_quality("perplexity", table.columns)
    candidates = fronts(table, quality, resamples=2)
    figure = draw_fronts(candidates, quality)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "prefill, batch 1, 512 tokens", "prefill, batch 8, 512 tokens",
        "decode, batch 1, after 128 tokens", "decode, batch 8, after 128 tokens",
    ]  # fmt: skip
    first = candidates[(candidates["phase"] == "prefill") & (candidates["batch_size"] == 1)]
    drawn = {
        (round(x, 9), round(y, 9))
        for line in figure.axes[0].get_lines()
        if line.get_marker() not in ("None", "|")
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    assert drawn == {(round(x, 9), round(y, 9)) for x, y in zip(first["ratio"], first["value"], strict=True)}


def test_labels_do_not_overlap(tmp_path: Path) -> None:
    # Twelve points in a corner: those without room stay unlabelled.
    speed = [[cell("prefill", 1, 512, 0, ratio=0.6 + i / 500, ideal=0.5)] for i in range(12)]
    points = [point("adapted", 8 + i, 2 + i / 500, active=0.25, speed=speed[i]) for i in range(12)]
    points.append(point("adapted", 1, 4.0, active=0.9, speed=[cell("prefill", 1, 512, 0, ratio=0.9, ideal=0.5)]))
    write_record(tmp_path, record("m", "synthetic-a", 0, points))
    table = load(tmp_path).table
    quality = find_quality("perplexity", table.columns)
    figure = draw_fronts(fronts(table, quality), quality)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert 2 <= len(boxes) < 13
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("backbones", [("synthetic-a",), ("synthetic-a", "synthetic-b")])
def test_pictures_are_written(tmp_path: Path, backbones: tuple[str, ...]) -> None:
    table = load(write_runs(tmp_path / "runs", seeds=(0,), backbones=backbones)).table
    loss = find_quality("nats_per_token", table.columns)
    figure = draw_gaps(gap_table(table, loss), loss)
    assert len([axes for axes in figure.axes if axes.get_ylabel() == ""]) >= len(backbones)
    save_png(figure, tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gaps.png", "runs"]


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    write_record(tmp_path, record("dense", "synthetic-a", 0, [point("dense", None, 2.0, active=1.0)]))
    table = load(tmp_path).table
    quality = find_quality("perplexity", table.columns)
    assert "measured time" in draw_fronts(fronts(table, quality), quality).texts[0].get_text()
    assert "No routed method" in draw_gaps(gap_table(table, quality), quality).texts[0].get_text()


def test_one_noisy_interval_does_not_squeeze_the_points() -> None:
    # span 0.6, a third of it is 0.2, the margin 0.09 * 0.6
    assert visible_range([0.4, 1.0], [0.39, 40.0]) == pytest.approx((0.39 - 0.054, 1.2 + 0.054))
    low, high = visible_range([1.0, 100.0], [float("nan")], log=True)
    assert (low * high, high) == pytest.approx((100.0, 10 ** (2 + 0.18)))
    low, high = visible_range([5.0], [])
    assert low < 5.0 < high


def test_a_single_batch_size_gives_one_wide_row(tmp_path: Path) -> None:
    speed = [cell("prefill", 1, 512, 0, ratio=0.7, ideal=0.5), cell("decode", 1, 8, 8, ratio=0.8, ideal=0.5)]
    long_name = "synthetic-backbone-with-a-name-as-long-as-they-come-on-the-hub/and-then-some-more"
    write_record(tmp_path, record("m", long_name, 0, [point("adapted", 8, 2.0, active=0.25, speed=speed)]))
    table = load(tmp_path).table
    quality = find_quality("perplexity", table.columns)
    figure = draw_fronts(fronts(table, quality), quality)
    FigureCanvasAgg(figure).draw()
    width, height = figure.bbox.width, figure.bbox.height
    assert width > 1.5 * height
    for part in (figure._suptitle, figure.legends[0]):
        box = part.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= width
