"""Records of finished experiments as one tidy table. The columns are documented in `moesaic.report.columns`.

Half-written, damaged and foreign files are named in `LoadedRuns.skipped` and otherwise ignored: a report of what is
whole is possible at any time, also while experiments run.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moesaic.report.columns import CELL_COLUMNS, COLUMNS, POINT_COLUMNS, RECORD_COLUMNS, Column, task_column
from moesaic.report.labels import label_configurations, label_settings, machine_name
from moesaic.runs.record import DOCUMENTS_FILE, ITEMS_FILE, RECORD_FILE, SCHEMA_VERSION
from moesaic.runs.status import STATUS_FILE, Status

__all__ = ["Experiment", "FailedStage", "LoadedRuns", "NoRecordsError", "Skipped", "load"]

# Parts of a resolved config that cannot change a result, so that they do not tell configurations apart.
_NOT_CONFIGURATION = frozenset({"seed", "paths", "study", "controls", "dry_run", "keep_going", "tracker", "launcher"})


# How the store names folders that are not (or no longer) whole.
_SET_ASIDE = re.compile(r"\.(partial|corrupt-\d+)$")


class NoRecordsError(ValueError):
    """The folder does not exist or holds no record that can be read."""


class RecordError(ValueError):
    """One record cannot be used; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A file or folder that looks like a record and is not used."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedStage:
    """A stage whose last try failed, by its own status."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One record as it was written, and its folder."""

    folder: Path
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedRuns:
    """Everything that was read from one runs folder."""

    root: Path
    table: pd.DataFrame  # columns: moesaic.report.columns.COLUMNS, then task.<task>.<metric>
    experiments: tuple[Experiment, ...]
    skipped: tuple[Skipped, ...]
    failed_stages: tuple[FailedStage, ...]

    def documents(self) -> pd.DataFrame:
        """Per-document losses of all records: experiment, arm, budget, document, nll (nats, summed), tokens, bytes."""
        return self._side_files(DOCUMENTS_FILE)

    def items(self) -> pd.DataFrame:
        """Per-item task results of all records: experiment, arm, budget, task, item, gold, option log-likelihoods."""
        return self._side_files(ITEMS_FILE)

    def _side_files(self, name: str) -> pd.DataFrame:
        frames = []
        for experiment in self.experiments:
            path = experiment.folder / name
            if path.is_file():
                frame = pd.read_parquet(path)
                frame.insert(0, "experiment", experiment.record["name"])
                frame.insert(1, "identity", experiment.record["identity"])
                frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def load(runs: str | Path) -> LoadedRuns:
    """Read every record under the folder `runs`.

    Raises: NoRecordsError if the folder does not exist or nothing in it can be used; it names what was skipped.
    """
    root = Path(runs)
    if not root.is_dir():
        raise NoRecordsError(f"{root} is not a folder. Give the folder that `moesaic` wrote its runs to.")
    experiments: dict[str, Experiment] = {}
    skipped: list[Skipped] = []
    failed: list[FailedStage] = []
    rows: list[dict[str, Any]] = []
    for folder in _stage_folders(root):
        failed += _failed_stage(folder)
        if not (folder / RECORD_FILE).is_file():
            continue
        try:
            record = _read_record(folder)
            found = _rows(record, folder)
            identity_text = str(record["identity"])
            if identity_text in experiments:
                raise RecordError(f"same experiment as {experiments[identity_text].folder}")
        except RecordError as error:
            skipped.append(Skipped(path=folder / RECORD_FILE, reason=str(error)))
            continue
        rows += found
        experiments[identity_text] = Experiment(folder=folder, record=record)
    if not experiments:
        raise NoRecordsError(_nothing_found(root, skipped))
    return LoadedRuns(
        root=root,
        table=_tidy(rows, experiments.values()),
        experiments=tuple(experiments.values()),
        skipped=tuple(skipped),
        failed_stages=tuple(failed),
    )


def _stage_folders(root: Path) -> Iterator[Path]:
    """Folders that hold a record or a stage status, in a stable order; nothing below a record is looked at."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        if RECORD_FILE in files or STATUS_FILE in files:
            yield Path(folder)
        if RECORD_FILE in files:
            folders.clear()


def _failed_stage(folder: Path) -> list[FailedStage]:
    status = Status.read(folder) if _SET_ASIDE.search(folder.name) else None
    if status is None or status.state != "failed":
        return []
    message = f": {status.message}" if status.message else ""
    return [FailedStage(path=folder, reason=f"{status.reason or 'error'}{message}")]


def _read_record(folder: Path) -> dict[str, Any]:
    if _SET_ASIDE.search(folder.name):
        raise RecordError(f"half-written, or set aside as damaged: the folder is called {folder.name}")
    try:
        record = json.loads((folder / RECORD_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"not readable as JSON: {error}") from error
    if not isinstance(record, dict) or "schema_version" not in record:
        raise RecordError("not a moesaic record: no schema_version")
    if record["schema_version"] != SCHEMA_VERSION:
        raise RecordError(f"schema_version {record['schema_version']!r}; this moesaic reads {SCHEMA_VERSION}")
    if record.get("state") not in ("done", "failed"):  # failed: some of its points are, and say so themselves
        raise RecordError(f"its state is {record.get('state')!r}, not 'done' or 'failed'")
    if not isinstance(record.get("points"), list) or not record["points"]:
        raise RecordError("'points' is missing, empty or not a list")
    for part in ("config", "environment", "protocol"):
        if not isinstance(record.setdefault(part, {}), dict):
            raise RecordError(f"{part} is not an object")
    return record


def _rows(record: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The table's rows of one record. RecordError for a field that is missing or of the wrong type."""
    common = _extract(record, RECORD_COLUMNS, "")
    common["record_dir"] = str(folder)
    common["machine"] = machine_name(record["environment"], record["config"], record["protocol"])
    default_knob = str(_at(record, "method.knob") or "") or None
    rows = []
    for index, point in enumerate(record["points"]):
        where = f"points[{index}]"
        values = common | _extract(point, POINT_COLUMNS, where) | _task_values(point, where)
        values["knob"] = values["knob"] or default_knob
        cells = point.get("speed") or []
        if not isinstance(cells, list):
            raise RecordError(f"{where}.speed is not a list")
        for number, cell in enumerate(cells):
            rows.append(values | _extract(cell, CELL_COLUMNS, f"{where}.speed[{number}]"))
        if not cells:
            rows.append(values)
    return rows


def without_seeds(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config without seeds, at any depth, and without what cannot change a result."""
    return {key: _drop_seed(value) for key, value in config.items() if key not in _NOT_CONFIGURATION}


def _drop_seed(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _drop_seed(value) for key, value in node.items() if key != "seed"}
    return [_drop_seed(value) for value in node] if isinstance(node, list) else node


def _extract(node: Any, columns: Iterable[Column], where: str) -> dict[str, Any]:
    if not isinstance(node, Mapping):
        raise RecordError(f"{where} is not an object")
    values = {}
    for column in columns:
        value = _at(node, column.source)
        if value is None and column.required:
            raise RecordError(f"{_join(where, column.source)} is missing")
        values[column.name] = _typed(value, column, _join(where, column.source))
    return values


def _typed(value: Any, column: Column, where: str) -> Any:
    if value is None or column.kind == "text":
        return None if value is None else str(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecordError(f"{where} is {value!r}; a number is needed")
    return value


def _task_values(point: Mapping[str, Any], where: str) -> dict[str, float]:
    tasks = _at(point, "quality.tasks") or {}
    if not isinstance(tasks, Mapping):
        raise RecordError(f"{where}.quality.tasks is not an object")
    return {
        task_column(task, metric): value
        for task, metrics in tasks.items()
        if isinstance(metrics, Mapping)
        for metric, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _at(node: Any, path: str) -> Any:
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _join(where: str, source: str) -> str:
    return f"{where}.{source}" if where else source


def _tidy(rows: list[dict[str, Any]], experiments: Iterable[Experiment]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    for column in COLUMNS:
        if column.name not in frame:
            frame[column.name] = None
        if column.kind != "text":
            frame[column.name] = pd.to_numeric(frame[column.name]).astype("float64")
            if column.kind == "int" and not frame[column.name].isin([math.inf, -math.inf]).any():
                frame[column.name] = frame[column.name].round().astype("Int64")
    frame = label_settings(frame)
    frame["label"] = frame["configuration"].map(label_configurations(frame, _configs(experiments)))
    tasks = sorted(name for name in frame.columns if name.startswith("task."))
    return frame[[column.name for column in COLUMNS] + tasks]


def _configs(experiments: Iterable[Experiment]) -> dict[str, dict[str, Any]]:
    """Identity of each record to its resolved config, seeds and result-neutral parts left out."""
    return {str(e.record["identity"]): without_seeds(e.record["config"]) for e in experiments}


def _nothing_found(root: Path, skipped: list[Skipped]) -> str:
    if not skipped:
        return f"no record.json under {root}. Run `moesaic` first, or give the folder that it wrote its runs to."
    lines = "\n".join(f"  {entry.path}: {entry.reason}" for entry in skipped[:10])
    more = f"\n  ... and {len(skipped) - 10} more" if len(skipped) > 10 else ""
    return f"no usable record under {root}; skipped:\n{lines}{more}"
