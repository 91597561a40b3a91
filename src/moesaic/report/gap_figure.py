"""gaps.png: where the loss comes from, one row per method and budget, one mark per rung of the ladder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from moesaic.report import format as fmt
from moesaic.report.canvas import DPI, STYLE, empty_figure
from moesaic.report.columns import Quality
from moesaic.report.gaps import visible_limit
from moesaic.report.palette import RUNG_MARKS, RungMark

__all__ = ["draw_gaps"]

_LINES: dict[str, Any] = {"dense": "solid", "dense_same_tokens": (0, (4, 3))}


def draw_gaps(gaps: pd.DataFrame, quality: Quality) -> Figure:
    """One panel per model. `gaps` is what `gap_table(table, quality)` gives; values beyond the panel get an arrow."""
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        panels = [(str(model), rows) for model, rows in gaps.groupby("model", sort=False)]
        if not panels:
            return empty_figure("No routed method was evaluated.")
        heights = [len(rows) for _, rows in panels]
        figure = Figure(
            figsize=(9, _row_inches(sum(heights)) * sum(heights) + 1.25 * len(panels) + 0.6),
            dpi=DPI,
            layout="constrained",
        )
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (model, rows) in zip(grid, panels, strict=True):
            _panel(axes, rows, quality)
            axes.set_title(model)
        _legend(figure)
        return figure


def _row_inches(rows: int) -> float:
    """Many rows stand closer, so that a picture of all methods still fits a page."""
    return 0.42 if rows <= 20 else 0.26


def _panel(axes: Axes, rows: pd.DataFrame, quality: Quality) -> None:
    names = [f"{row['label']}  {fmt.percent(row['active_ffn_frac'], 0)}" for row in rows.to_dict("records")]
    limit = visible_limit(rows, quality)
    for name, style in _LINES.items():
        values = rows[name].dropna().unique()
        for value in values:
            axes.axvline(value, color="#555555", linewidth=1.2, linestyle=style, zorder=1)
    for height, row in enumerate(rows.to_dict("records")):
        _ladder(axes, height, row, limit)
    axes.set_yticks(np.arange(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if np.isfinite(limit):
        near, far = axes.get_xlim()
        axes.set_xlim((limit, far) if quality.maximise else (near, limit))
    if quality.column == "nats_per_token":
        _perplexity_axis(axes)
    axes.set_xlabel(f"{quality.label}  ({'right' if quality.maximise else 'left'} is better)")


def _perplexity_axis(axes: Axes) -> None:
    low, high = axes.get_xlim()
    top = axes.secondary_xaxis("top", functions=(np.exp, _log))
    top.set_xlabel("perplexity", fontsize=8.5)
    wide = LogLocator(subs=(1.0, 2.0, 5.0)) if high - low > np.log(3) else MaxNLocator(6)
    top.xaxis.set_major_locator(wide)
    top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _log(values: Any) -> Any:
    # matplotlib also asks for places outside the axis, where a loss would come from a perplexity of 0.
    return np.log(np.maximum(values, 1e-12))


def _ladder(axes: Axes, height: int, row: Mapping[Any, Any], limit: float) -> None:
    path = [row[name] for name in ("dense", "oracle_router", "learned_router", "adapted") if not pd.isna(row[name])]
    axes.plot(path, [height] * len(path), color="#c9c9c9", linewidth=2, zorder=2, solid_capstyle="round")
    beyond = []
    for rung in RUNG_MARKS:
        value = row[rung.rung]
        if pd.isna(value):
            continue
        if (value - limit) * (limit - row["dense"]) > 0:  # beyond the limit, seen from dense; false without a limit
            beyond.append(f"{rung.label} {fmt.significant(value, 3)}")
            continue
        axes.plot(
            [value], [height], marker=rung.mark.marker, markersize=8, linestyle="none", zorder=4,
            color=rung.mark.light, markerfacecolor=rung.mark.light if rung.filled else "white", markeredgewidth=1.6,
        )  # fmt: skip
    if beyond:
        axes.annotate(
            "→ " + ", ".join(beyond), (1.01, height), xycoords=("axes fraction", "data"), va="center", fontsize=8,
            color="#555555",
        )  # fmt: skip


def _legend(figure: Figure) -> None:
    entries = [_entry(rung) for rung in RUNG_MARKS]
    entries += [Line2D([], [], color="#555555", linestyle=style, label=name) for name, style in _LINES.items()]
    figure.legend(handles=entries, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _entry(rung: RungMark) -> Line2D:
    fill = rung.mark.light if rung.filled else "white"
    return Line2D(
        [], [], color=rung.mark.light, marker=rung.mark.marker, linestyle="none", markerfacecolor=fill,
        markeredgewidth=1.6, markersize=8, label=rung.label,
    )  # fmt: skip
