"""width_oracle.png: what widths per token could gain, where the learned router lies, which layers the oracle widens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moesaic.report.canvas import DPI, STYLE

__all__ = ["draw_width_oracle"]

_RANDOM, _ORACLE, _LEARNED, _STATIC = "#8c8c8c", "#009e73", "#d55e00", "#0072b2"


def draw_width_oracle(summary: Mapping[str, Any], title: str) -> Figure:
    """Three panels of a `WidthOracle.summary()`: loss over width, layers used over width, and who gains from width."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.5, 4.4), dpi=DPI, layout="constrained")
        loss, layers, gain = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        _losses(loss, summary)
        _layers(layers, summary)
        _gains(gain, summary)
        protocol = summary["protocol"]
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        search = "all" if protocol["search"] == "exhaustive" else "a beam of"
        what = f"{search} {protocol['patterns']:,} patterns of {protocol['num_layers']} layers"
        widths = f"{protocol['levels_E']} of {protocol['levels_E'][-1]} blocks"
        note = f"{protocol['tokens']:,} tokens, {what} at {widths}. The oracle is {protocol['caveat']}."
        figure.supxlabel(note, fontsize=8.5, color="#555555")
        return figure


def _losses(axes: Axes, summary: Mapping[str, Any]) -> None:
    rows = summary["budgets"]
    shares = [row["share"] for row in rows]
    low, high = ([row["pattern_nats"][name] for row in rows] for name in ("p10", "p90"))
    axes.fill_between(shares, low, high, color=_RANDOM, alpha=0.25, linewidth=0, label="patterns, 10 % to 90 %")
    axes.plot(shares, [row["random_nats"] for row in rows], color=_RANDOM, label="random pattern (mean)")
    static = [row["best_pattern"]["nats"] for row in rows]
    axes.plot(shares, static, color=_STATIC, marker="s", markersize=3.5, label="best single pattern")
    oracle = [row["oracle_nats"] for row in rows]
    axes.plot(shares, oracle, color=_ORACLE, marker="o", markersize=3.5, label="oracle per token (bound)")
    points = summary["learned"]
    if points:
        places = [[point[name] for point in points] for name in ("share", "nats")]
        axes.plot(*places, color=_LEARNED, marker="D", markersize=7, linestyle="none", label="learned", zorder=5)
    axes.axhline(summary["full_nats"], color="#1a1a1a", linewidth=1, linestyle=(0, (4, 3)), label="full width")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("mean active share of the FFNs")
    axes.set_ylabel("loss in nats per token")
    axes.set_title("What width buys")
    axes.legend(frameon=False, fontsize=8)


def _layers(axes: Axes, summary: Mapping[str, Any]) -> None:
    levels_E = np.asarray(summary["protocol"]["levels_E"])
    rows = summary["budgets"]
    width_XL = np.asarray([np.asarray(row["use_LE"]) @ (levels_E / levels_E[-1]) for row in rows])
    shares = np.asarray([row["share"] for row in rows])
    # What a layer gets beyond its equal part: all layers widen as the budget grows, which would hide the rest.
    more_XL = width_XL - shares[:, None]
    limit = max(0.01, float(np.abs(more_XL).max()))
    # Costs need not be evenly spaced: each column reaches halfway to its neighbours.
    edges = np.concatenate([shares[:1], (shares[1:] + shares[:-1]) / 2, shares[-1:]])
    num_layers = more_XL.shape[1]
    image = axes.pcolormesh(edges, np.arange(num_layers + 1), more_XL.T, cmap="PuOr_r", vmin=-limit, vmax=limit)
    axes.set_yticks(np.arange(num_layers) + 0.5, [str(layer) for layer in range(num_layers)])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(visible=False)
    axes.set_xlabel("mean active share of the FFNs")
    axes.set_ylabel("layer")
    axes.set_title("Where the oracle spends")
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, format=PercentFormatter(1))
    bar.set_label("width of the layer beyond the mean share", fontsize=8.5)


def _gains(axes: Axes, summary: Mapping[str, Any]) -> None:
    rows = summary["difficulty"]["by_full_loss"]
    places = np.arange(1, len(rows) + 1)
    axes.bar(places - 0.2, [row["gap_nats"] for row in rows], width=0.38, color=_STATIC, label="narrow minus full")
    axes.bar(
        places + 0.2,
        [row["below_full_nats"] for row in rows],
        width=0.38,
        color=_ORACLE,
        label="full minus best of all patterns",
    )
    axes.axhline(0, color="#8a8a8a", linewidth=0.8)
    axes.set_xticks(places, [f"{row['full_nats']:.1f}" for row in rows], fontsize=8)
    axes.set_xlabel("tenths of the tokens, by loss at full width (nats)")
    axes.set_ylabel("nats per token")
    axes.set_title("Who gains from width")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
    axes.legend(frameon=False, fontsize=8, loc="upper left")
