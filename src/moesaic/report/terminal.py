"""The results as a table in the terminal: quality beside measured and ideal time, and what lies on the front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moesaic.report import format as fmt
from moesaic.report.columns import Quality
from moesaic.report.front import cell_label
from moesaic.report.pays_terminal import pays_tables, unpaired
from moesaic.report.results import Results
from moesaic.report.summary import CELL_KEYS, deployed, failures, in_reading_order
from moesaic.report.write import ReportFiles

__all__ = ["headline_cells", "print_files", "print_results", "results_tables"]

_ON_FRONT = "●"
_BEATS_IDEAL = "!"
_WIDE = 112  # characters; in a narrower terminal a point takes three lines
_LONGEST_KNOB = 5  # a longer name would widen the whole table; the page shows it


def print_results(console: Console, results: Results) -> None:
    """Print one table per setting, whether routing pays, then what failed and what was skipped."""
    for table in [*results_tables(results, width=console.width), *pays_tables(results.pays, width=console.width)]:
        console.print(table)
    for reason in unpaired(results.pays):
        console.print(f"no static slice beside {reason}", style="yellow", markup=False)
    for row in failures(results.runs.table).to_dict("records"):
        name = f"{row['label']} {fmt.budget('', row['budget'])} ({row['arm']}, seed {row['seed']})"
        console.print(f"failed: {name}: {row['failure_reason']}", style="yellow", markup=False)
    for stage in results.runs.failed_stages:
        console.print(f"failed: {stage.path}: {stage.reason}", style="yellow", markup=False)
    for entry in results.runs.skipped:
        console.print(f"skipped: {entry.path}: {entry.reason}", style="yellow", markup=False)


def results_tables(results: Results, *, width: int) -> list[Table]:
    """One rich table per setting, for a terminal of `width` characters.

    Each phase is shown at its smallest batch; the other cells are in the report.
    """
    table, candidates = results.runs.table, results.candidates
    extra = [found for found in results.qualities if found.maximise and found != results.quality][:1]
    settings = table[["model", "setting"]].drop_duplicates().to_dict("records")
    points = in_reading_order(deployed(results.points))
    tables = []
    for names in settings:
        mine = candidates[candidates["setting"] == names["setting"]]
        if len(mine) or len(settings) == 1:
            rows = points[points["model"] == names["model"]]
            tables.append(_table(str(names["setting"]), rows, mine, [results.quality, *extra], width < _WIDE))
    return tables


def print_files(console: Console, files: ReportFiles) -> None:
    """Print where each part of the report is."""
    for path, meaning in (
        (files.page, "interactive report, one file, no network"),
        (files.shares, "quality against active FFN share"),
        (files.pareto, "Pareto fronts"),
        (files.gaps, "where the loss comes from"),
        (files.pays, "every routed point beside the static slice of its width"),
        (files.pays_csv, "the same table as text"),
        (files.parquet, "tidy table"),
        (files.csv, "the same table as text"),
    ):
        if path is None:
            continue
        console.print(f"{path}", style="bold", markup=False, highlight=False, soft_wrap=True, end="")
        console.print(f"  {meaning}", highlight=False, soft_wrap=True)


def headline_cells(candidates: pd.DataFrame) -> list[dict[str, Any]]:
    """The cell of each phase with the smallest batch, prefill first."""
    cells = candidates[list(CELL_KEYS)].drop_duplicates().sort_values(["batch_size", "tokens", "context_tokens"])
    first = cells.drop_duplicates("phase").sort_values("phase", ascending=False)
    return [{str(key): value for key, value in row.items()} for row in first.to_dict("records")]


def _table(setting: str, points: pd.DataFrame, candidates: pd.DataFrame, shown: list[Quality], narrow: bool) -> Table:
    cells = headline_cells(candidates)
    table = Table(title=setting, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.padding, table.collapse_padding = (0, 1, 0, 0), True
    table.caption, table.caption_justify = _caption(points, candidates, cells), "left"
    table.add_column("method", overflow="fold", min_width=12)
    for heading in _headings(cells, shown, narrow):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in points.to_dict("records"):
        if previous not in (None, row["label"]):
            table.add_section()
        label = "" if previous == row["label"] else str(row["label"])
        previous = row["label"]
        found = [_candidate(candidates, row, cell) for cell in cells]
        speed = [part for candidate in found for part in _speed_of(candidate, narrow)]
        table.add_row(label, *_quality_of(row, shown), *speed)
    return table


def _headings(cells: list[dict[str, Any]], shown: list[Quality], narrow: bool) -> list[str]:
    headings = ["budget", "active\nFFN", *(quality.label.replace(" ", "\n") for quality in shown)]
    for cell in cells:
        headings += [f"{cell['phase']}\nratio"] + ([] if narrow else ["ideal"])
    return headings


def _quality_of(row: Mapping[Any, Any], shown: list[Quality]) -> list[str]:
    knob = row["knob"] if len(str(row["knob"])) <= _LONGEST_KNOB else None
    values = [fmt.budget(knob, row["budget"]), fmt.percent(row["active_ffn_frac"])]
    return values + [fmt.quality(row[quality.column], quality.column) for quality in shown]


def _candidate(candidates: pd.DataFrame, row: Mapping[Any, Any], cell: Mapping[str, Any]) -> dict[str, Any] | None:
    keep = (candidates["configuration"] == row["configuration"]) & (candidates["arm"] == row["arm"])
    for key, value in {**cell, "budget": row["budget"]}.items():
        keep &= candidates[key].isna() if pd.isna(value) else (candidates[key] == value).fillna(False).astype(bool)
    found = candidates[keep].to_dict("records")
    return {str(key): value for key, value in found[0].items()} if found else None


def _speed_of(candidate: Mapping[str, Any] | None, narrow: bool) -> list[str | Text]:
    """Measured ratio with mark and interval, and the ideal one: side by side, or in one cell of three lines."""
    if candidate is None:
        return [fmt.MISSING] if narrow else [fmt.MISSING, fmt.MISSING]
    measured = Text(f"{_ON_FRONT} " if candidate["on_front"] else "", style="green")
    measured.append(fmt.ratio(candidate["ratio"]), style="default bold")
    ends, ideal = fmt.interval(candidate["ratio_low"], candidate["ratio_high"]), fmt.ratio(candidate["ideal_ratio"])
    if ends:
        measured.append(("\n" if narrow else " ") + ends, style="default dim")
    if candidate["ratio_high"] < candidate["ideal_ratio"]:
        ideal = f"{_BEATS_IDEAL}{ideal}"
    if narrow and ideal != fmt.MISSING:
        measured.append(f"\nideal {ideal}", style="default dim")
    return [measured] if narrow else [measured, ideal]


def _caption(points: pd.DataFrame, candidates: pd.DataFrame, cells: list[dict[str, Any]]) -> str:
    fewest, most = points["seeds"].min(), points["seeds"].max()
    seeds = f"Seeds: {fewest if fewest == most else f'{fewest}-{most}'}."
    if not cells:
        return f"{seeds} Nothing was timed."
    timed = "; ".join(cell_label(*(cell[key] for key in CELL_KEYS)) for cell in cells)
    beaten = (candidates["ratio_high"] < candidates["ideal_ratio"]).any()
    warning = f" {_BEATS_IDEAL} = wholly below the ideal: an error to explain." if beaten else ""
    return (
        f"{seeds} Timed: {timed}. Ratio = sparse time / dense time "
        f"(below 1 is faster), with its 95 % interval; ideal = the cost model's ratio. {_ON_FRONT} = on the Pareto "
        f"front of quality and that ratio.{warning}"
    )
