"""Colours and marks of methods, the same in PNG and page: colour-blind-safe, controls in greys.

Source: Okabe and Ito, "Color Universal Design" (the hues; the second of each pair is lightened for dark pages).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from moesaic.report.summary import CONTROL_METHODS, in_reading_order

__all__ = ["RUNG_MARKS", "Mark", "RungMark", "candidate_marks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """How one curve is drawn. `symbol` is plotly's name, `marker` matplotlib's, for the same shape."""

    light: str  # on a white ground
    dark: str  # on a dark ground
    symbol: str
    marker: str


_CONTROLS = (("#1a1a1a", "#f2f2f2"), ("#5c5c5c", "#bdbdbd"), ("#757575", "#a3a3a3"), ("#8c8c8c", "#8c8c8c"))
_CONTROL_SHAPES = (("star", "*"), ("x", "X"), ("square", "s"), ("triangle-down", "v"))
_HUES = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#ff9a4d"),
    ("#009e73", "#3ddbb0"),
    ("#b5478f", "#f09cd0"),
    ("#b07d00", "#f0d040"),
    ("#6a4fb3", "#b3a1f2"),
)
_SHAPES = (("circle", "o"), ("diamond", "D"), ("triangle-up", "^"), ("pentagon", "p"), ("hexagon", "h"))


def _mark(colours: tuple[str, str], shape: tuple[str, str]) -> Mark:
    return Mark(light=colours[0], dark=colours[1], symbol=shape[0], marker=shape[1])


def candidate_marks(candidates: pd.DataFrame, others: pd.DataFrame | None = None) -> dict[str, Mark]:
    """Label to mark: the labels of `candidates` in reading order, then those of `others`. Past 30, marks repeat."""
    found: dict[str, Mark] = {}
    counted = 0
    ordered = in_reading_order(candidates)
    frames = [ordered, ordered if others is None else in_reading_order(others)]
    pairs = [pair for frame in frames for pair in zip(frame["label"], frame["method"], strict=True)]
    for label, method in dict.fromkeys(pairs):
        if method in CONTROL_METHODS:
            index = CONTROL_METHODS.index(method)
            colours, shape = _CONTROLS[index], _CONTROL_SHAPES[index]
        else:
            colours, shape = _HUES[counted % len(_HUES)], _SHAPES[counted % len(_SHAPES)]
            counted += 1
        found[label] = _mark(colours, shape)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class RungMark:
    """How one rung of the gap ladder is drawn."""

    rung: str
    label: str
    mark: Mark
    filled: bool


# In drawing order: what comes later lies on top.
RUNG_MARKS = (
    RungMark(rung="static_slice", label="static slice", mark=_mark(_CONTROLS[2], ("square", "s")), filled=True),
    RungMark(rung="oracle_router", label="oracle routing", mark=_mark(_HUES[2], ("circle-open", "o")), filled=False),
    RungMark(rung="learned_router", label="learned router", mark=_mark(_HUES[0], ("diamond-open", "D")), filled=False),
    RungMark(rung="adapted", label="adapted", mark=_mark(_HUES[1], ("circle", "o")), filled=True),
    RungMark(rung="random_router", label="random router", mark=_mark(_HUES[3], ("x-thin-open", "x")), filled=False),
)
