"""What the page draws from: plain JSON of points, oracles, cells, fronts, volumes and the gap ladder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from moesaic.report import format as fmt
from moesaic.report.columns import Quality
from moesaic.report.front import FRONT_KEYS, ReferencePoint, cell_label, hypervolumes
from moesaic.report.gaps import visible_limit
from moesaic.report.palette import RUNG_MARKS, candidate_marks
from moesaic.report.results import Results
from moesaic.report.summary import CELL_KEYS, DENSE_METHODS, deployed, in_reading_order

__all__ = ["payload"]

_POINT_FIELDS = {
    "ratio": "ratio",
    "low": "ratio_low",
    "high": "ratio_high",
    "over": "ratio_interval_over",
    "ideal": "ideal_ratio",
    "captured": "captured_share_frac",
    "sparse_ms": "sparse_ms",
    "dense_ms": "dense_ms",
    "all_blocks": "all_blocks_ratio",
    "executor": "executor",
}


def payload(results: Results) -> dict[str, Any]:
    """JSON-able content of the page."""
    table, shown = results.runs.table, results.qualities
    cells = _cells(results.fronts.values())
    untimed = in_reading_order(deployed(results.points))
    oracles = results.points[results.points["arm"] == "oracle_router"]
    points = _points(results.fronts, cells, shown) + [_point(row, None, shown) for row in _records(untimed)]
    settings = table.drop_duplicates("setting")
    corner = results.reference
    return {
        "settings": [str(name) for name in settings["setting"]],
        "models": {str(row["setting"]): str(row["model"]) for row in _records(settings[["setting", "model"]])},
        "cells": [{"id": number, **cell} for number, cell in enumerate(cells.values())],
        "qualities": [_quality(one) for one in shown],
        "quality": results.quality.name,
        "labels": list(dict.fromkeys(untimed["label"])),
        "styles": {
            label: {"light": mark.light, "dark": mark.dark, "symbol": mark.symbol}
            for label, mark in candidate_marks(results.candidates, untimed).items()
        },
        "points": points,
        "oracles": [_point(row, None, shown) for row in _records(oracles)],
        "volumes": _volumes(results.fronts, cells, shown, corner),
        "reference": f"reference: quality {corner.quality_cost:g}× and time {corner.latency_ratio:g}× of dense",
        "rungs": [
            {"rung": r.rung, "label": r.label, "light": r.mark.light, "dark": r.mark.dark, "symbol": r.mark.symbol}
            for r in RUNG_MARKS
        ],
        "gaps": [
            _gaps(str(model), rows, results.gap_quality) for model, rows in results.gaps.groupby("model", sort=False)
        ],
    }


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _cell_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(None if pd.isna(row[key]) else row[key] for key in FRONT_KEYS)


def _cells(candidates: Iterable[pd.DataFrame]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Every timed cell: its key to setting, label and machine; prefill first, then by batch."""
    columns = ["machine", *FRONT_KEYS]
    known = pd.concat([frame[columns] for frame in candidates]).drop_duplicates(list(FRONT_KEYS))
    ordered = known.sort_values(["phase", "batch_size", "tokens"], ascending=[False, True, True], kind="stable")
    return {
        _cell_key(row): {
            "setting": str(row["setting"]),
            "label": cell_label(*(row[key] for key in CELL_KEYS)),
            "machine": str(row["machine"]),
        }
        for row in _records(ordered)
    }


def _points(
    by_quality: Mapping[str, pd.DataFrame], cells: Mapping[tuple[Any, ...], Any], shown: Sequence[Quality]
) -> list[dict[str, Any]]:
    """One entry per timed point, with each quality's front membership, in reading order."""
    numbers = {key: number for number, key in enumerate(cells)}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, frame in by_quality.items():
        for row in _records(frame):
            key = (_cell_key(row), row["configuration"], row["arm"], fmt.budget("", row["budget"]))
            point = found.setdefault(key, _point(row, numbers[_cell_key(row)], shown))
            if name in point["quality"]:
                point["quality"][name] |= {
                    "on_front": bool(row["on_front"]),
                    "membership": _finite(row["membership_frac"]),
                }
    return list(found.values())


def _point(row: Mapping[str, Any], cell: int | None, shown: Sequence[Quality]) -> dict[str, Any]:
    budget = fmt.budget(row["knob"], row["budget"])
    return {
        "key": f"{row['configuration']} {row['arm']} {budget}",
        "cell": cell,
        "model": row["model"],
        "label": row["label"],
        "method": row["method"],
        "dense": row["method"] in DENSE_METHODS,
        "budget": budget,
        "budget_value": _finite(row["budget"]),
        "active": _finite(row["active_ffn_frac"]),
        "flops": _share(row["model_flops_per_token"], row["dense_model_flops_per_token"]),
        "seeds": int(row["seeds"]),
        "quality": {
            one.name: {
                "value": _finite(row[one.column]),
                "low": _finite(row[f"{one.column}_low"]),
                "high": _finite(row[f"{one.column}_high"]),
                "on_front": False,
                "membership": None,
            }
            for one in shown
            if _finite(row[one.column]) is not None
        },
        **{name: _finite(row.get(column)) for name, column in _POINT_FIELDS.items()},
    }


def _finite(value: Any) -> Any:
    """`value` if JSON can hold it and it says something, else None."""
    if value is None or isinstance(value, str):
        return value or None
    return None if pd.isna(value) or not math.isfinite(value) else float(value)


def _share(part: Any, whole: Any) -> float | None:
    return None if pd.isna(part) or pd.isna(whole) or not whole else float(part / whole)


def _quality(quality: Quality) -> dict[str, Any]:
    return {
        "name": quality.name,
        "label": quality.label,
        "maximise": quality.maximise,
        "percent": quality.column.endswith("_frac"),
    }


def _volumes(
    by_quality: Mapping[str, pd.DataFrame],
    cells: Mapping[tuple[Any, ...], Any],
    shown: Sequence[Quality],
    reference: ReferencePoint,
) -> list[dict[str, Any]]:
    numbers = {key: number for number, key in enumerate(cells)}
    return [
        {
            "cell": numbers[_cell_key(row)],
            "quality": quality.name,
            "value": _finite(row["hypervolume"]),
            "dense": _finite(row["dense_hypervolume"]),
        }
        for quality in shown
        for row in _records(hypervolumes(by_quality[quality.name], quality, reference))
    ]


def _gaps(model: str, rows: pd.DataFrame, quality: Quality) -> dict[str, Any]:
    first = rows.iloc[0]
    return {
        "model": model,
        "quality": quality.label,
        "maximise": quality.maximise,
        "limit": _finite(visible_limit(rows, quality)),
        "dense": _finite(first["dense"]),
        "dense_same_tokens": _finite(first["dense_same_tokens"]),
        "rows": [
            {
                "name": f"{row['label']}  {fmt.percent(row['active_ffn_frac'], 0)}",
                "values": {rung.rung: _finite(row[rung.rung]) for rung in RUNG_MARKS},
            }
            for row in _records(rows)
        ],
    }
