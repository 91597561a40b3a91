"""Whether routing pays, as tables in the terminal: one of losses per model, and one per task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from moesaic.report import format as fmt
from moesaic.report.pays import LOSES, OPEN, PAYS
from moesaic.report.pays_section import caveats, slice_width
from moesaic.report.scores import LOSS

__all__ = ["pays_tables", "unpaired"]

_STYLES = {PAYS: "green", LOSES: "red", OPEN: "dim"}
_CAPTION = (
    "Difference: paired on the same documents (tasks: items) within a seed, mean over seeds; interval: 95 %, bootstrap "
    "over documents (items). can't tell: the interval holds 0, or seeds disagree. Oracle's share: (slice - method) / "
    "(slice - oracle). dense: dense_same_tokens."
)
_WIDE = 144  # characters; in a narrower terminal an interval stands below its difference, and what is less is left out


def pays_tables(pays: pd.DataFrame, *, width: int) -> list[Table]:
    """One rich table per model and measure that has a slice, margins left out, for a terminal of `width` characters."""
    shown = pays[~pays["measure"].str.endswith(".margin")]
    compared = shown.groupby(["model", "measure"])["slice"].transform("count") > 0
    shown = shown[compared]
    several = shown["model"].nunique() > 1
    tables = []
    for (model, measure), rows in shown.groupby(["model", "measure"], sort=False):
        title = f"Does routing pay? {_called(str(measure))}" + (f", {model}" if several else "")
        tables.append(_table(title, rows, narrow=width < _WIDE))
    if tables:
        said = [tables[-1].caption, _CAPTION, *caveats(pays)]
        tables[-1].caption = "\n".join(str(part) for part in said if part)
    return tables


def unpaired(pays: pd.DataFrame) -> list[str]:
    """Why nothing stands beside the methods of a model that has no slice at all; `pays_tables` shows nothing of it."""
    losses = pays[pays["measure"] == LOSS]
    alone = losses[losses.groupby("model")["slice"].transform("count") == 0]
    said = [f"{row['label']}: {row['reason']}" for row in alone.to_dict("records")]
    return list(dict.fromkeys(said))


def _called(measure: str) -> str:
    return "Loss, nats per token" if measure == LOSS else f"{measure.removesuffix('.acc')} accuracy"


def _table(title: str, rows: pd.DataFrame, *, narrow: bool) -> Table:
    loss = rows["measure"].iloc[0] == LOSS
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.padding, table.collapse_padding = (0, 1, 0, 0), True
    table.add_column("method", overflow="fold", min_width=10)
    for heading in ["active\nFFN", "loss" if loss else "value", "static\nslice", "method -\nslice"]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    if loss and not narrow:
        table.add_column("oracle's\nshare", justify="right", no_wrap=True)
    table.add_column("method -\ndense", justify="right", no_wrap=True)
    if loss and not narrow:
        table.add_column("s/token\n/ dense", justify="right", no_wrap=True)
    reasons: list[str] = []
    previous = None
    for row in rows.to_dict("records"):
        if previous not in (None, row["label"]):
            table.add_section()
        label = "" if previous == row["label"] else str(row["label"])
        previous = row["label"]
        table.add_row(label, *_cells(row, loss=loss, narrow=narrow))
        if pd.isna(row["slice"]):
            reasons.append(f"No slice beside {row['label']}: {row['reason']}.")
    table.caption, table.caption_justify = "\n".join(dict.fromkeys(reasons)) or None, "left"
    return table


def _cells(row: Mapping[Any, Any], *, loss: bool, narrow: bool) -> list[str | Text]:
    write = fmt.significant if loss else fmt.percent
    sliced = Text(write(row["slice"]))
    if width := slice_width(row):
        sliced.append(f"\n{width}", style="dim")
    cells: list[str | Text] = [
        fmt.percent(row["active_ffn_frac"]),
        write(row["value"]),
        sliced,
        _difference(row, "difference", loss=loss, narrow=narrow),
        Text(row["verdict"], style=_STYLES[row["verdict"]]) if row["verdict"] in _STYLES else fmt.MISSING,
    ]
    if loss and not narrow:
        cells.append(fmt.percent(row["oracle_share_frac"], 0))
    if narrow:
        cells.append(fmt.difference(row["dense_difference"], points=not loss))
    else:
        cells.append(_difference(row, "dense_difference", loss=loss, narrow=narrow))
    if loss and not narrow:
        cells.append(fmt.ratio(row["adaptation_time_ratio"]))
    return cells


def _difference(row: Mapping[Any, Any], name: str, *, loss: bool, narrow: bool) -> Text:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    text = Text(fmt.difference(value, points=not loss), style="bold")
    if not pd.isna(low):
        ends = " to ".join(fmt.difference(end, points=not loss).lstrip("+") for end in (low, high))
        text.append(f"\n{ends}" if narrow else f" {ends}", style="not bold dim")
    return text
