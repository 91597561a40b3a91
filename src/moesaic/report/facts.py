"""How a set of records was measured: what protocols and environments share, where they differ, what it cost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from moesaic.report.load import Experiment

__all__ = ["shared_facts", "stage_costs"]

_STAGE_NUMBERS = ("wall_seconds", "cpu_seconds", "peak_rss_bytes")


def shared_facts(experiments: Iterable[Experiment], part: str) -> list[tuple[str, list[str]]]:
    """For each leaf of the records' `part` ("environment", "protocol"): its dotted name and its distinct values."""
    found: dict[str, dict[str, None]] = {}
    for experiment in experiments:
        for key, value in _leaves(experiment.record[part]):
            found.setdefault(key, {})[value] = None
    return [(key, list(values)) for key, values in found.items()]


def stage_costs(experiments: Iterable[Experiment]) -> pd.DataFrame:
    """Seconds and memory per kind of stage. A stage that several experiments share is counted once.

    Columns: stage, stages (how many different ones), wall_seconds, cpu_seconds (summed), peak_rss_bytes (largest).
    """
    rows = []
    for experiment in experiments:
        stages = experiment.record.get("stages")
        for stage in stages if isinstance(stages, list) else []:
            if isinstance(stage, Mapping) and isinstance(stage.get("stage"), str):
                numbers = {name: stage.get(name) for name in _STAGE_NUMBERS}
                numeric = {name: value if isinstance(value, int | float) else None for name, value in numbers.items()}
                rows.append({"stage": stage["stage"], "identity": str(stage.get("identity")), **numeric})
    frame = pd.DataFrame(rows, columns=["stage", "identity", *_STAGE_NUMBERS]).drop_duplicates(["stage", "identity"])
    frame = frame.astype(dict.fromkeys(_STAGE_NUMBERS, "float64"))
    return (
        frame.groupby("stage", sort=False)
        .agg(
            stages=("identity", "count"),
            wall_seconds=("wall_seconds", "sum"),
            cpu_seconds=("cpu_seconds", "sum"),
            peak_rss_bytes=("peak_rss_bytes", "max"),
        )
        .reset_index()
    )


def _leaves(node: Any, path: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif node is not None:
        yield path, node if isinstance(node, str) else json.dumps(node)
