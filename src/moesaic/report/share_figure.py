"""share.png: quality against active FFN share, every method beside the static slice, the dense model and its oracle.

Sparser is left, where methods differ most; so labels stand there, in the order of the curves, and the axis right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from moesaic.report import format as fmt
from moesaic.report.canvas import DPI, STYLE, empty_figure
from moesaic.report.columns import Quality
from moesaic.report.front_figure import quality_axis
from moesaic.report.palette import Mark, candidate_marks
from moesaic.report.summary import DENSE_METHODS, deployed, in_reading_order

__all__ = ["draw_shares"]

_PANEL_INCHES = (7.8, 4.6)
_LABEL_INCHES = 0.21  # height of one label
_MARGIN_INCHES = 1.3  # above and below a panel
_LETTER_INCHES = 0.078  # of a label
_SIDE_STEP = 0.0022  # of the FFN: methods at one share stand side by side
_DENSE_LINES: dict[str, Any] = {"dense": "solid", "dense_same_tokens": (0, (4, 3))}


def draw_shares(points: pd.DataFrame, quality: Quality) -> Figure:
    """One panel per model. `points` is what `summarise_points` gives: seed means of all arms, timed or not."""
    final = in_reading_order(deployed(points[points[quality.column].notna()]))
    final = final[final["active_ffn_frac"].notna()]
    with matplotlib.rc_context(STYLE):
        panels = [(str(model), rows) for model, rows in final.groupby("model", sort=False)]
        if final[~final["method"].isin(DENSE_METHODS)].empty:
            return empty_figure("No sparse point has both a quality and an active share.")
        heights = [max(_PANEL_INCHES[1], _LABEL_INCHES * rows["label"].nunique()) for _, rows in panels]
        beside = _LETTER_INCHES * final["label"].map(len).max() + 0.35
        size = (_PANEL_INCHES[0] + beside, sum(heights) + _MARGIN_INCHES * len(panels))
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        left = beside / size[0]
        figure.get_layout_engine().set(rect=(left, 0, 1 - left, 1))  # type: ignore[union-attr, call-arg]
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        marks = candidate_marks(final)
        for axes, (model, rows) in zip(grid, panels, strict=True):
            oracles = points[(points["arm"] == "oracle_router") & (points["model"] == model)]
            _panel(axes, rows, oracles, quality, marks)
            axes.set_title(f"{model} · {_seeds(rows)}")
        _legend(figure)
        FigureCanvasAgg(figure).draw()
        figure.set_layout_engine("none")
        for axes, (_, rows) in zip(grid, panels, strict=True):
            _label_curves(axes, rows, quality, marks)
        return figure


def _panel(axes: Axes, rows: pd.DataFrame, oracles: pd.DataFrame, quality: Quality, marks: Mapping[str, Mark]) -> None:
    ends = {f"value{end}": rows[f"{quality.column}{end}"] for end in ("", "_low", "_high")}
    shown = rows.assign(**ends)
    for name, style in _DENSE_LINES.items():
        for value in shown.loc[shown["method"] == name, "value"]:
            axes.axhline(value, color="#555555", linewidth=1.2, linestyle=style, zorder=1)
    sparse = _set_aside(shown)
    for label, curve in sparse.groupby("label", sort=False):
        _curve(axes, curve.sort_values("share"), marks[str(label)])
    quality_axis(axes, shown, quality)
    aside = sparse.drop_duplicates("label").set_index("label")["aside"]
    for row in oracles[oracles["label"].isin(aside.index)].to_dict("records"):
        share = row["active_ffn_frac"] + aside[row["label"]]
        _oracle(axes, share, row[quality.column], marks[row["label"]])
    low, high = sparse["share"].min(), sparse["share"].max()
    room = max(0.02, 0.04 * (high - low))
    axes.set_xlim(low - room, high + room)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.percent(value, 0)))
    axes.set_xlabel("active FFN share  (left is sparser)")
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.spines[["left", "right"]].set_visible(False)
    axes.set_ylabel(f"{quality.label}  ({'higher' if quality.maximise else 'lower'} is better)")


def _set_aside(rows: pd.DataFrame) -> pd.DataFrame:
    """The sparse rows with `aside`, one small step per label, and the `share` at which they are drawn."""
    sparse = rows[~rows["method"].isin(DENSE_METHODS)]
    place, labels = pd.factorize(sparse["label"])
    aside = _SIDE_STEP * (place - (len(labels) - 1) / 2)
    return sparse.assign(aside=aside, share=sparse["active_ffn_frac"] + aside)


def _curve(axes: Axes, curve: pd.DataFrame, mark: Mark) -> None:
    width = 3.5 if str(curve["method"].iloc[0]).startswith("static_") else 1.2
    share, value = curve["share"], curve["value"]
    below, above = (value - curve["value_low"]).clip(lower=0), (curve["value_high"] - value).clip(lower=0)
    axes.plot(share, value, color=mark.light, linewidth=width, alpha=0.45, zorder=2)
    axes.errorbar(
        share, value, yerr=[below.fillna(0), above.fillna(0)], fmt="none", ecolor=mark.light, elinewidth=1, alpha=0.7,
        zorder=3,
    )  # fmt: skip
    axes.plot(share, value, linestyle="none", zorder=5, **_filled(mark))


def _filled(mark: Mark) -> dict[str, Any]:
    return {
        "marker": mark.marker, "markersize": 6.5, "markerfacecolor": mark.light, "markeredgecolor": "white",
        "markeredgewidth": 0.8,
    }  # fmt: skip


def _oracle(axes: Axes, share: float, value: float, mark: Mark) -> None:
    """A hollow mark; beyond the picture it stands on its edge as an arrow."""
    if pd.isna(share) or pd.isna(value):
        return
    low, high = axes.get_ylim()
    outside = not low <= value <= high
    arrow = r"$\uparrow$" if value > high else r"$\downarrow$"
    axes.plot(
        [share], [min(max(value, low), high)], linestyle="none", markersize=6, markerfacecolor="none", zorder=4,
        marker=arrow if outside else mark.marker, markeredgecolor=mark.light, markeredgewidth=1.1, clip_on=not outside,
    )  # fmt: skip


def _label_curves(axes: Axes, rows: pd.DataFrame, quality: Quality, marks: Mapping[str, Mark]) -> None:
    """Write each curve's label left of the panel, in the order of their leftmost points. The layout must be final."""
    first = _set_aside(rows).sort_values("share", kind="stable").drop_duplicates("label")
    ends = axes.transData.transform(first[["share", quality.column]].to_numpy(dtype=float))
    order = np.argsort(ends[:, 1], kind="stable")
    heights = _spread(ends[order, 1], _LABEL_INCHES * axes.figure.dpi * 0.9, axes.bbox.y0, axes.bbox.y1)
    place = axes.bbox.x0 - 0.16 * axes.figure.dpi
    for index, height in zip(order, heights, strict=True):
        label = str(first["label"].iloc[index])
        mark = marks[label]
        line = Line2D([place, ends[index, 0]], [height, ends[index, 1]], color=mark.light, alpha=0.4, linewidth=0.8)
        glyph = Line2D([place], [height], linestyle="none", **_filled(mark))
        for artist in (line, glyph):
            axes.figure.add_artist(artist)
            artist.set_transform(None)
        axes.figure.text(
            place - 0.08 * axes.figure.dpi, height, label, transform=None, ha="right", va="center", fontsize=8.5,
            color="#333333",
        )  # fmt: skip


def _spread(wanted: Iterable[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending positions at least `gap` apart, each as near to `wanted` (ascending) as that allows."""
    groups: list[tuple[float, int]] = []  # centre of the wanted positions, and how many stand together
    for position in wanted:
        groups.append((position, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (second, more), (first, some) = groups.pop(), groups.pop()
            groups.append(((first * some + second * more) / (some + more), some + more))
    found = [centre + gap * (place - (count - 1) / 2) for centre, count in groups for place in range(count)]
    shift = max(0.0, low - found[0]) - max(0.0, found[-1] - high) if found else 0.0
    return [position + shift for position in found]


def _seeds(rows: pd.DataFrame) -> str:
    fewest, most = rows["seeds"].min(), rows["seeds"].max()
    text = f"{fewest if fewest == most else f'{fewest}–{most}'} seed{'s' if most > 1 else ''}"
    bars = ", bars: 95 % over seeds" if most > 1 else ""
    return f"{text}{bars}; methods at one share stand side by side"


def _legend(figure: Figure) -> None:
    grey = "#555555"
    entries = [
        Line2D([], [], color=grey, marker="o", linewidth=1.2, markersize=6.5, label="method"),
        Line2D([], [], color=grey, marker="o", linestyle="none", markerfacecolor="none", label="its oracle, untrained"),
        Line2D([], [], color="#757575", alpha=0.45, linewidth=3.5, label="static slice or depth"),
        *(
            Line2D([], [], color=grey, linewidth=1.2, linestyle=style, label=name)
            for name, style in _DENSE_LINES.items()
        ),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
