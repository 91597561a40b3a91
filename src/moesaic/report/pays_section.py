"""The page's part "Does routing pay?": the comparison of losses, of task answers, and what adapting cost."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd

from moesaic.report import format as fmt
from moesaic.report.markup import bullets, fixed_table
from moesaic.report.paired import FEW_UNITS
from moesaic.report.pays import LOSES, OPEN, PAYS
from moesaic.report.scores import LOSS

__all__ = ["caveats", "pays_section", "slice_width"]

_NOTES = (
    "Difference: method minus slice, paired on the same documents (tasks: items) within a seed, mean over seeds. Its "
    "interval is 95 %, by bootstrap over documents (items), one draw for all seeds; ± is the standard deviation over "
    "seeds, which is not in that interval.",
    "can't tell: the interval holds 0, or the seeds disagree about the sign.",
    "Oracle: the method's own blocks, the best for each token, before any training. Its share is (slice - method) / "
    "(slice - oracle), where the oracle's lead over the slice is clear; above 100 % training added more than routing "
    "lost.",
    "Price of sparsity: method minus dense_same_tokens.",
)
_STYLES = {PAYS: "onfront", LOSES: "loses", OPEN: "quiet"}
_GIB = 2**30


def pays_section(pays: pd.DataFrame) -> str:
    """HTML of the section's text and tables. `pays` is what `pays_table` gives."""
    if pays.empty:
        return "<p>No routed method was evaluated.</p>"
    parts = [
        "<p>Each routed method beside a static slice, no routing at all, of the same active FFN share, backbone, data, "
        "protocol, seed and adaptation tokens. Where even that slice is as good, the router is not worth its cost.</p>"
    ]
    several = pays["model"].nunique() > 1
    for model, rows in pays.groupby("model", sort=False):
        losses, answers = rows[rows["measure"] == LOSS], rows[rows["measure"] != LOSS]
        parts.append(f"<h3>{escape(str(model))}</h3>" if several else "")
        parts.append(_losses(losses))
        if len(answers):
            parts.append("<h4>Tasks</h4>" + _answers(answers))
        parts.append("<h4>What adapting cost</h4>" + _costs(losses))
    return "".join(parts) + bullets([*_NOTES, *caveats(pays)])


def caveats(pays: pd.DataFrame) -> list[str]:
    """What limits the numbers in `pays`: interpolated slices, few documents."""
    notes = []
    if pays["interpolated"].eq(True).any():
        notes.append(
            "Between two measured widths the slice is interpolated linearly, document by document. Losses usually bend "
            "upwards as slices get narrower; the straight line then lies above a real slice's loss and favours the "
            "method a little."
        )
    few = pays[(pays["measure"] == LOSS) & (pays["documents"] < FEW_UNITS)]
    for count, drawn, pieces in few[["documents", "resampled", "resampled_count"]].drop_duplicates().to_numpy():
        meaning = "this interval is coarse; do not lean on it."
        if drawn == "windows":
            meaning = (
                f"their {pieces:.0f} windows were resampled, so the interval speaks of other passages of these "
                "documents, not of other documents."
            )
        notes.append(f"Few documents ({count:.0f}): {meaning}")
    return notes


def slice_width(row: Mapping[Any, Any]) -> str:
    """Where an interpolated slice lies: "25–50 %"; empty where it was measured."""
    if row["interpolated"] is not True:
        return ""
    return f"{fmt.percent(row['slice_from_frac']).removesuffix(' %')}–{fmt.percent(row['slice_to_frac'])}"


def _losses(rows: pd.DataFrame) -> str:
    heads = [
        "method", "budget", "active FFN", "perplexity", "loss, nats", "slice at this share", "difference", "verdict",
        "oracle, difference", "oracle's share", "price of sparsity", "seeds", "documents", "remarks",
    ]  # fmt: skip
    body = [
        [
            *_point(row),
            fmt.significant(row["perplexity"]),
            fmt.significant(row["value"]),
            fmt.significant(row["slice"]) + _between(row),
            _difference(row, "difference"),
            _verdict(row),
            _difference(row, "oracle_difference"),
            fmt.percent(row["oracle_share_frac"], 0),
            _difference(row, "dense_difference"),
            _count(row["paired_seeds"]),
            _count(row["documents"]),
            _remarks(row),
        ]
        for row in rows.to_dict("records")
    ]
    return fixed_table(heads, body, text={0, 7, len(heads) - 1}, label="Loss beside a static slice")


def _answers(rows: pd.DataFrame) -> str:
    """One row per point and task, accuracy and margin side by side."""
    measures = [
        heading
        for name in ("accuracy", "margin, nats")
        for heading in (name, "slice at this share", "difference", "verdict", "price of sparsity")
    ]
    heads = ["method", "budget", "active FFN", "task", *measures, "items"]
    tasks = rows.assign(task=rows["measure"].str.rsplit(".", n=1).str[0])
    body = []
    for (_, _, _, task), pair in tasks.groupby(["configuration", "arm", "budget", "task"], dropna=False, sort=False):
        by_measure = {row["measure"].rsplit(".", 1)[1]: row for row in pair.to_dict("records")}
        first = pair.to_dict("records")[0]
        cells = [cell for name in ("acc", "margin") for cell in _answer(by_measure[name])]
        body.append([*_point(first), escape(str(task)), *cells, _count(first["documents"])])
    table = fixed_table(heads, body, text={0, 3, 7, 12}, label="Task answers beside a static slice")
    return table + '<p class="quiet">Above 0 is better. Differences of accuracies are in percentage points.</p>'


def _answer(row: Mapping[Any, Any]) -> list[str]:
    write = fmt.percent if _is_fraction(row) else fmt.significant
    return [
        write(row["value"]),
        write(row["slice"]) + _between(row),
        _difference(row, "difference"),
        _verdict(row),
        _difference(row, "dense_difference"),
    ]


def _between(row: Mapping[Any, Any]) -> str:
    width = slice_width(row)
    return _small(f"between {width}" if width else "")


def _costs(rows: pd.DataFrame) -> str:
    heads = ["method", "tokens of one model", "wall seconds, all budgets", "peak GiB", "seconds per token / dense"]
    body = [
        [
            escape(str(row["label"])),
            _count(row["adaptation_tokens"]),
            fmt.significant(row["adaptation_wall_seconds"], 3),
            fmt.significant(row["adaptation_peak_rss_bytes"] / _GIB, 3),
            fmt.ratio(row["adaptation_time_ratio"]),
        ]
        for row in rows.drop_duplicates("configuration").to_dict("records")
    ]
    table = fixed_table(heads, body, text={0}, label="What adapting cost")
    return table + (
        '<p class="quiet">Sums over the adapt stages of a record, mean over seeds; the router\'s training is in the '
        "seconds. Seconds depend on what else the machine did.</p>"
    )


def _point(row: Mapping[Any, Any]) -> list[str]:
    budget, active = fmt.budget(row["knob"], row["budget"]), fmt.percent(row["active_ffn_frac"])
    return [escape(str(row["label"])), escape(budget), active]


def _difference(row: Mapping[Any, Any], name: str) -> str:
    """The difference, its interval and, of the one that the verdict is about, its spread over seeds."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    points = _is_fraction(row)
    ends = "" if pd.isna(low) else f"{fmt.difference(low, points=points)} to {fmt.difference(high, points=points)}"
    text = fmt.difference(value, points=points) + _small(ends)
    spread = row["difference_seed_sd"] if name == "difference" else float("nan")
    return text + _small("" if pd.isna(spread) else f"± {fmt.difference(spread, points=points).lstrip('+')} over seeds")


def _verdict(row: Mapping[Any, Any]) -> str:
    verdict = row["verdict"]
    return f'<span class="{_STYLES[verdict]}">{escape(verdict)}</span>' if verdict in _STYLES else fmt.MISSING


def _remarks(row: Mapping[Any, Any]) -> str:
    said = [f"no slice: {row['reason']}" if row["reason"] and pd.isna(row["slice"]) else ""]
    said.append(f"no dense_same_tokens: {row['dense_reason']}" if row["dense_reason"] else "")
    said.append(row["remarks"])
    text = "; ".join(part for part in said if part)
    return f'<span class="wrap">{escape(text)}</span>' if text else ""


def _is_fraction(row: Mapping[Any, Any]) -> bool:
    return str(row["measure"]).endswith(".acc")


def _count(value: Any) -> str:
    return fmt.MISSING if pd.isna(value) else f"{value:,.0f}"


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""
