"""levels.png: how wide labels and routers make each layer's nested experts, for which tokens, and how often rightly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moesaic.report.canvas import DPI, STYLE

__all__ = ["draw_levels"]

_QUARTERS = ("easiest quarter", "second", "third", "hardest quarter")


def draw_levels(facts: Mapping[str, Any], title: str) -> Figure:
    """Five panels of what a phase of nested experts reported about labels and routers, layer by layer.

    `facts` holds `base_labels_LE_by_theta`, `labels_LE`, `levels_LE` (shares of tokens),
    `router_{top1,within_one,prior}_L` and, for causal language models, `share_by_loss_quartile_LQ`.
    Raises KeyError where the phase reported none of them.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 7.2), dpi=DPI, layout="constrained")
        (base, labels, levels), (accuracy, difficulty, unused) = figure.subplots(2, 3)
        unused.set_axis_off()
        _by_theta(base, facts["base_labels_LE_by_theta"])
        _stack(labels, facts["labels_LE"], "Labels: the smallest level that is good enough")
        _stack(levels, facts["levels_LE"], "Routers: the level chosen")
        _accuracy(accuracy, facts)
        _difficulty(difficulty, facts.get("share_by_loss_quartile_LQ"))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        return figure


def _by_theta(axes: Axes, labels_LE_by_theta: Mapping[str, Sequence[Sequence[float]]]) -> None:
    thetas = sorted(labels_LE_by_theta, key=float)
    colours = matplotlib.colormaps["cividis"](np.linspace(0.9, 0.05, len(thetas)))
    for theta, colour in zip(thetas, colours, strict=True):
        share_LE = np.asarray(labels_LE_by_theta[theta])
        mean_L = share_LE @ np.arange(1, share_LE.shape[1] + 1)
        axes.plot(mean_L, color=colour, marker="o", markersize=4, label=f"theta {theta}")
    axes.set_title("Mean label before training, by theta")
    axes.set_xlabel("layer")
    axes.set_ylabel("mean level")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _stack(axes: Axes, share_LE: Sequence[Sequence[float]], title: str) -> None:
    shares = np.asarray(share_LE)
    num_layers, num_levels = shares.shape
    colours = matplotlib.colormaps["viridis"](np.linspace(0.95, 0.1, num_levels))
    bottom = np.zeros(num_layers)
    for level in range(num_levels):
        share_L, name = shares[:, level], str(level + 1)
        axes.bar(range(num_layers), share_L, bottom=bottom, color=colours[level], width=0.8, label=name)
        bottom += shares[:, level]
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of tokens")
    axes.set_ylim(0, 1)
    axes.grid(visible=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], title="level", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _accuracy(axes: Axes, facts: Mapping[str, Any]) -> None:
    drawn = (
        ("router_top1_L", "the label's level", "#d55e00", "o"),
        ("router_within_one_L", "within one level", "#0072b2", "s"),
        ("router_prior_L", "the commonest label alone", "#8c8c8c", "v"),
    )
    for key, name, colour, marker in drawn:
        axes.plot(facts[key], color=colour, marker=marker, markersize=5, label=name)
    axes.set_title("How often the router is right")
    axes.set_xlabel("layer")
    axes.set_ylabel("share of tokens")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _difficulty(axes: Axes, share_LQ: Sequence[Sequence[float]] | None) -> None:
    axes.set_title("Who is given width, by the loss of the next token")
    if share_LQ is None:
        axes.text(0.5, 0.5, "known for causal language models only", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    colours = matplotlib.colormaps["plasma"](np.linspace(0.85, 0.15, len(_QUARTERS)))
    for quarter, (name, colour) in enumerate(zip(_QUARTERS, colours, strict=True)):
        axes.plot([row[quarter] for row in share_LQ], color=colour, marker="o", markersize=4, label=name)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean active share")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
