"""What both pictures share: type, colours of lines and ticks, resolution, and how they get to the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moesaic.runs.atomic import open_atomic

__all__ = ["DPI", "STYLE", "empty_figure", "save_png"]

STYLE: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#ececec",
    "axes.axisbelow": True,
}
DPI = 160


def save_png(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` in one step."""
    with open_atomic(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def empty_figure(text: str) -> Figure:
    """A small picture that says why there is nothing to draw."""
    figure = Figure(figsize=(6, 2), dpi=DPI)
    figure.text(0.5, 0.5, text, ha="center", va="center", color="#555555")
    return figure
