"""How a set of records was measured: what protocols and environments share, where they differ, what it cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moesaic.report.load import Experiment

__all__ = ["AdaptCost", "seconds_per_token", "shared_facts", "stage_costs", "stages_of"]

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
        for stage in stages_of(experiment):
            numeric = {name: _number(stage, name) for name in _STAGE_NUMBERS}
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


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptCost:
    """What the adapt stages of one record took together, for all budgets; NaN where the record does not say."""

    wall_seconds: float
    peak_rss_bytes: float
    tokens: float

    @classmethod
    def of(cls, experiment: Experiment) -> AdaptCost:
        """Seconds and memory from the record's stages, tokens from what each phase reported."""
        stages = [stage for stage in stages_of(experiment) if stage["stage"] == "adapt"]
        adaptation = experiment.record.get("adaptation")
        phases = adaptation.get("phases") if isinstance(adaptation, Mapping) else None
        told = [phase for phase in phases if isinstance(phase, Mapping)] if isinstance(phases, list) else []
        return cls(
            wall_seconds=sum(_number(stage, "wall_seconds") for stage in stages) if stages else math.nan,
            peak_rss_bytes=max((_number(stage, "peak_rss_bytes") for stage in stages), default=math.nan),
            tokens=sum(_number(phase, "tokens", missing=0.0) for phase in told) or math.nan,
        )


def seconds_per_token(costs: Sequence[AdaptCost]) -> float:
    """Seconds of adapt stages per token of adaptation, over all records of `costs`; NaN where one is not known."""
    tokens = sum(cost.tokens for cost in costs)
    return sum(cost.wall_seconds for cost in costs) / tokens if tokens else math.nan


def stages_of(experiment: Experiment) -> list[Mapping[str, Any]]:
    """The record's entries of stages that have a name."""
    stages = experiment.record.get("stages")
    entries = stages if isinstance(stages, list) else []
    return [entry for entry in entries if isinstance(entry, Mapping) and isinstance(entry.get("stage"), str)]


def _number(entry: Mapping[str, Any], name: str, missing: float = math.nan) -> float:
    value = entry.get(name)
    return float(value) if isinstance(value, int | float) else missing


def _leaves(node: Any, path: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif node is not None:
        yield path, node if isinstance(node, str) else json.dumps(node)
