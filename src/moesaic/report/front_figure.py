"""pareto.png: the fronts as a still picture, one panel per speed cell."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike

from moesaic.report import format as fmt
from moesaic.report.canvas import DPI, STYLE, empty_figure
from moesaic.report.columns import Quality
from moesaic.report.front import cell_label, dense_quality
from moesaic.report.palette import Mark, candidate_marks
from moesaic.report.summary import CELL_KEYS, DENSE_METHODS

__all__ = ["draw_fronts", "quality_axis", "visible_range"]

_PANEL_INCHES = (4.9, 3.7)
_WIDE_PANEL_INCHES = (6.6, 5.2)
_CROWD = 8  # labels above which panels are wide and only points on the front are written at
_LETTERS_PER_INCH = 11.5
_MARGIN = 0.09  # of the values' span, beyond the outermost
_LOG_SPAN = 4.0  # largest / smallest value above which a loss axis is logarithmic


def draw_fronts(candidates: pd.DataFrame, quality: Quality) -> Figure:
    """One panel per speed cell: measured ratio across, quality up; a row per setting and phase.

    `candidates` is what `fronts(table, quality)` gives. Without timed points the figure says so.
    """
    with matplotlib.rc_context(STYLE):
        rows = _panel_rows(candidates)
        if not rows:
            return empty_figure("No point has both a quality and a measured time.")
        columns = max(len(cells) for _, cells in rows)
        crowded = candidates["label"].nunique() > _CROWD
        width, height = _WIDE_PANEL_INCHES if crowded else _PANEL_INCHES
        figure = Figure(figsize=(width * columns, height * len(rows) + 0.9), dpi=DPI, layout="constrained")
        styles = candidate_marks(candidates)
        several = candidates["setting"].nunique() > 1
        panels = []
        for number, (setting, cells) in enumerate(rows):
            for column, points in enumerate(cells):
                axes = figure.add_subplot(len(rows), columns, number * columns + column + 1)
                _panel(axes, points, quality, styles, setting if several else "")
                panels.append((axes, points))
        _legend(figure, styles, columns)
        heading = textwrap.fill(_heading(candidates), width=int(_LETTERS_PER_INCH * width * columns))
        figure.suptitle(heading, x=0.01, ha="left", fontsize=11)
        FigureCanvasAgg(figure).draw()
        figure.set_layout_engine("none")
        for axes, points in panels:
            _label_shares(axes, points, points[points["on_front"]] if crowded else points)
        return figure


def visible_range(values: ArrayLike, ends: ArrayLike, *, log: bool = False) -> tuple[float, float]:
    """Where an axis begins and ends: all of `values`, and their intervals' `ends` up to a third of their span.

    A noisy interval then runs off the picture and does not squeeze the points.
    """
    shown, reach = np.asarray(values, dtype=float), np.asarray(ends, dtype=float)
    reach = reach[np.isfinite(reach) & ((reach > 0) | (not log))]
    if log:
        shown, reach = np.log10(shown), np.log10(reach)
    span = np.ptp(shown) or abs(shown[0]) / 10 or 1.0
    low = max(np.append(shown, reach).min(), shown.min() - span / 3) - _MARGIN * span
    high = min(np.append(shown, reach).max(), shown.max() + span / 3) + _MARGIN * span
    return (10**low, 10**high) if log else (low, high)


def quality_axis(axes: Axes, points: pd.DataFrame, quality: Quality) -> None:
    """Scale, ticks and range of the upright axis, from the `value`, `value_low` and `value_high` of `points`."""
    low, high = points["value"].min(), points["value"].max()
    fraction = quality.column.endswith("_frac")
    log = bool(not fraction and low > 0 and high / low > _LOG_SPAN)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.percent(value) if fraction else f"{value:g}"))
    axes.set_ylim(visible_range(points["value"], _ends(points, "value"), log=log))


def _heading(candidates: pd.DataFrame) -> str:
    """What all panels share: the model and machine where there is one, seeds, and what the bars are."""
    parts = [str(candidates[name].iloc[0]) for name in ("model", "machine") if candidates[name].nunique() == 1]
    fewest, most = candidates["seeds"].min(), candidates["seeds"].max()
    parts.append(f"{fewest if fewest == most else f'{fewest}–{most}'} seed{'s' if most > 1 else ''}")
    over = " and ".join(candidates["ratio_interval_over"].dropna().unique())
    return " · ".join(parts) + (f" · bars: 95 % over {over}" if over else "")


def _panel_rows(candidates: pd.DataFrame) -> list[tuple[str, list[pd.DataFrame]]]:
    """Panels by row: a row per phase, or per setting where each phase has only one cell."""
    rows = []
    for setting, mine in candidates.groupby("setting", sort=False):
        of_setting = []
        for phase in ("prefill", "decode"):
            of_phase = mine[mine["phase"] == phase].sort_values(["batch_size", "tokens"], kind="stable")
            cells = [cell for _, cell in of_phase.groupby(list(CELL_KEYS), dropna=False, sort=False)]
            of_setting += [cells] if cells else []
        if all(len(cells) == 1 for cells in of_setting):
            of_setting = [[cells[0] for cells in of_setting]]
        rows += [(str(setting), cells) for cells in of_setting]
    return rows


def _panel(axes: Axes, points: pd.DataFrame, quality: Quality, styles: Mapping[str, Mark], setting: str) -> None:
    first = points.iloc[0]
    title = cell_label(*(first[key] for key in CELL_KEYS))
    axes.set_title(f"{setting}\n{title}" if setting else title)
    dense = dense_quality(points)
    axes.axvline(1.0, color="#b0b0b0", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if not pd.isna(dense):
        axes.axhline(dense, color="#b0b0b0", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    _front_line(axes, points[points["on_front"]])
    for label, curve in points.groupby("label", sort=False):
        _curve(axes, curve.sort_values("active_ffn_frac"), styles[str(label)])
    quality_axis(axes, points, quality)
    axes.set_xlim(visible_range([*points["ratio"], *points["ideal_ratio"].dropna(), 1.0], _ends(points, "ratio")))
    axes.set_xlabel("measured time / dense time  (left is faster)")
    axes.set_ylabel(f"{quality.label}  ({'higher' if quality.maximise else 'lower'} is better)")


def _front_line(axes: Axes, front: pd.DataFrame) -> None:
    ordered = front.sort_values(["ratio", "value"])
    axes.plot(
        ordered["ratio"], ordered["value"], drawstyle="steps-post", color="#f0b400", linewidth=5, alpha=0.45, zorder=2,
        solid_capstyle="round",
    )  # fmt: skip


def _curve(axes: Axes, curve: pd.DataFrame, mark: Mark) -> None:
    axes.plot(curve["ratio"], curve["value"], color=mark.light, linewidth=1, alpha=0.55, zorder=3)
    axes.errorbar(
        curve["ratio"],
        curve["value"],
        xerr=_arms(curve, "ratio"),
        yerr=_arms(curve, "value"),
        fmt="none",
        ecolor=mark.light,
        elinewidth=1,
        alpha=0.7,
        zorder=4,
    )
    size = 12 if mark.marker == "*" else 7
    axes.plot(
        curve["ratio"], curve["value"], linestyle="none", marker=mark.marker, markersize=size, zorder=5,
        markerfacecolor=mark.light, markeredgecolor="white", markeredgewidth=0.9,
    )  # fmt: skip
    routed = curve[~curve["method"].isin(DENSE_METHODS)]
    axes.hlines(
        routed["value"], routed["ideal_ratio"], routed["ratio"], color=mark.light, linewidth=0.8, alpha=0.6,
        linestyle=(0, (1, 3)), zorder=3,
    )  # fmt: skip
    axes.plot(
        routed["ideal_ratio"], routed["value"], linestyle="none", marker="|", markersize=9, markeredgewidth=1.6,
        color=mark.light, alpha=0.75, zorder=4,
    )  # fmt: skip


def _arms(curve: pd.DataFrame, column: str) -> list[pd.Series]:
    """Lengths of the lower and upper error bar; 0 where there is no interval."""
    return [
        (curve[column] - curve[f"{column}_low"]).clip(lower=0).fillna(0),
        (curve[f"{column}_high"] - curve[column]).clip(lower=0).fillna(0),
    ]


def _ends(points: pd.DataFrame, column: str) -> list[float]:
    return [*points[f"{column}_low"], *points[f"{column}_high"]]


# Offsets in points and alignments that are tried in turn for a point's label.
_PLACES = (
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
    (7, 4, "left", "bottom"),
    (-7, -4, "right", "top"),
    (-7, 4, "right", "bottom"),
    (7, -4, "left", "top"),
)


def _label_shares(axes: Axes, points: pd.DataFrame, named: pd.DataFrame) -> None:
    """Write the active share beside each routed point of `named`, clear of all `points`. The layout must be final."""
    rows = points.to_dict("records")
    positions = [axes.transData.transform((row["ratio"], row["value"])) for row in rows]
    ticks = [axes.transData.transform((row["ideal_ratio"], row["value"])) for row in rows]
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in positions]
    taken += [Bbox.from_bounds(x - 2, y - 8, 4, 16) for x, y in ticks if x == x]
    taken += [_bar_box(axes, row, position) for row, position in zip(rows, positions, strict=True)]
    for row in named[~named["method"].isin(DENSE_METHODS)].to_dict("records"):
        for dx, dy, across, up in _PLACES:
            note = axes.annotate(
                fmt.percent(row["active_ffn_frac"], 0), (row["ratio"], row["value"]), xytext=(dx, dy),
                textcoords="offset points", ha=across, va=up, fontsize=7.5, color="#4a4a4a", zorder=6,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip
            box = note.get_window_extent()
            if (
                not any(box.overlaps(other) for other in taken)
                and axes.bbox.containsx(box.x0)
                and axes.bbox.containsx(box.x1)
            ):
                taken.append(box)
                break
            note.remove()


def _bar_box(axes: Axes, row: Mapping[Any, Any], position: Any) -> Bbox:
    """Where the vertical error bar of a point is, in pixels."""
    low, high = (row[end] if row[end] == row[end] else row["value"] for end in ("value_low", "value_high"))
    bottom, top = (axes.transData.transform((row["ratio"], value))[1] for value in (low, high))
    return Bbox.from_extents(position[0] - 1, bottom, position[0] + 1, top)


def _legend(figure: Figure, styles: Mapping[str, Mark], columns: int) -> None:
    entries: list[Line2D] = [
        Line2D([], [], color=mark.light, marker=mark.marker, linewidth=1, markeredgecolor="white", label=label,
               markersize=11 if mark.marker == "*" else 7)
        for label, mark in styles.items()
    ]  # fmt: skip
    entries += [
        Line2D([], [], color="#f0b400", linewidth=5, alpha=0.45, label="Pareto front"),
        Line2D([], [], color="#777777", linestyle="none", marker="|", markersize=9, label="ideal ratio (cost model)"),
        Line2D([], [], color="#b0b0b0", linestyle=(0, (4, 3)), label="dense model"),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=2 * columns, frameon=False, fontsize=9)
