"""report.html: one file that needs no network. Fixed tables are written here; page/*.js draw the rest."""

from __future__ import annotations

import base64
import gzip
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from moesaic.report import format as fmt
from moesaic.report.columns import Quality
from moesaic.report.facts import shared_facts, stage_costs
from moesaic.report.gaps import GAPS, RUNGS, Gap
from moesaic.report.load import LoadedRuns
from moesaic.report.markup import bullets, fixed_table
from moesaic.report.payload import payload
from moesaic.report.pays_section import pays_section
from moesaic.report.results import Results
from moesaic.report.summary import failures

__all__ = ["render"]

_MOST_VALUES = 6  # of a fact that differs between records


def render(results: Results) -> str:
    """The page's text."""
    runs, page = results.runs, files("moesaic.report") / "page"
    studies = ", ".join(runs.table["study"].dropna().unique())
    return Template((page / "report.html").read_text("utf-8")).substitute(
        title=escape(f"moesaic: {studies}" if studies else "moesaic report"),
        subtitle=escape(_subtitle(runs)),
        style=(page / "report.css").read_text("utf-8"),
        script="\n".join((page / name).read_text("utf-8") for name in ("report.js", "figures.js", "table.js")),
        data=_script_safe(payload(results)),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
        pays=pays_section(results.pays),
        gap_notes=_gap_notes(_shown_gaps(results.gaps)),
        gap_table=_gap_table(results.gaps, results.gap_quality),
        failures=_failures(runs),
        notes=_notes(results),
        facts=_facts(runs),
    )


def _script_safe(content: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")


def _subtitle(runs: LoadedRuns) -> str:
    table = runs.table
    seeds = sorted(int(seed) for seed in table["seed"].unique())
    parts = [
        f"{len(runs.experiments)} experiments",
        f"{table['configuration'].nunique()} configurations",
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
        " and ".join(table["model"].unique()),
    ]
    written = table["created_utc"].dropna()
    return " · ".join(parts + ([f"newest record {written.max()}"] if len(written) else []))


def _gap_notes(shown: list[Gap]) -> str:
    rows = "".join(f"<li><b>{escape(_words(gap.name))}</b>: {escape(gap.meaning)}.</li>" for gap in shown)
    return (
        "<p>Each routed method, from the dense model through its intermediate states. A gap is the difference of two "
        f"of them; what was not measured stays empty.</p><ul>{rows}</ul>"
    )


def _shown_gaps(gaps: pd.DataFrame) -> list[Gap]:
    """All gaps; that of a prepared dense model only where a method prepares one."""
    return [gap for gap in GAPS if gap.name != "prepare_gap" or gaps[gap.name].notna().any()]


def _gap_table(gaps: pd.DataFrame, quality: Quality) -> str:
    if gaps.empty:
        return "<p>No routed method was evaluated.</p>"
    rungs = [rung for rung in RUNGS if rung != "prepared_dense" or gaps[rung].notna().any()]
    shown = _shown_gaps(gaps)
    heads = ["method", "budget", "active FFN", *map(_words, rungs), *(_words(gap.name) for gap in shown), "remarks"]
    parts = []
    for model, rows in gaps.groupby("model", sort=False):
        body = [_gap_row(row, rungs, shown, quality) for row in rows.to_dict("records")]
        heading = f"<h3>{escape(str(model))}</h3>" if gaps["model"].nunique() > 1 else ""
        parts.append(heading + fixed_table(heads, body, text={0, len(heads) - 1}, label="Gaps"))
    unit = escape(quality.label)
    return "".join(parts) + f'<p class="quiet">All values: {unit}. Small print: 95 % interval over seeds.</p>'


def _gap_row(row: dict[Any, Any], rungs: list[str], shown: list[Gap], quality: Quality) -> list[str]:
    cells = [escape(str(row["label"])), fmt.budget(row["knob"], row["budget"]), fmt.percent(row["active_ffn_frac"])]
    cells += [fmt.quality(row[rung], quality.column) for rung in rungs]
    for gap in shown:
        low, high = row[f"{gap.name}_low"], row[f"{gap.name}_high"]
        ends = "" if pd.isna(low) else f"<small>{_signed(low)} – {_signed(high)}</small>"
        cells.append(_signed(row[gap.name]) + ends)
    return [*cells, escape(row["notes"])]


def _signed(value: Any) -> str:
    return fmt.MISSING if pd.isna(value) else f"{value:+.3f}".replace("-", "−")


def _failures(runs: LoadedRuns) -> str:
    failed = [
        f"{row['label']} {fmt.budget('', row['budget'])}, {row['arm']}, seed {row['seed']} on {row['model']}: "
        f"{row['failure_reason']}. {row['failure_message'] or ''}"
        for row in failures(runs.table).to_dict("records")
    ]
    stages = [f"{_below(runs, stage.path)}: {stage.reason}" for stage in runs.failed_stages]
    skipped = [f"{_below(runs, entry.path)}: {entry.reason}" for entry in runs.skipped]
    if not (failed or stages or skipped):
        return "<p>Nothing failed, and every record could be read.</p>"
    groups = (("Points that failed", failed), ("Stages that failed", stages), ("Files that were skipped", skipped))
    return "".join(f"<h3>{name}</h3>{bullets(entries)}" for name, entries in groups if entries)


def _below(runs: LoadedRuns, path: Any) -> str:
    return str(path.relative_to(runs.root))


def _notes(results: Results) -> str:
    reference, timed = results.reference, not results.candidates.empty
    pictures = ["share.png", *(["pareto.png"] if timed else []), "gaps.png"]
    return bullets(
        [
            "Time / dense is a ratio: sparse time over dense time, both measured in one process, alternating. Below 1 "
            "is faster than the dense model; 1 / ratio is the speed-up.",
            "The ideal ratio comes from the cost model with measured memory and arithmetic ceilings. The captured "
            "share is (1 - ratio) / (1 - ideal ratio): how much of the possible saving was reached. A ratio whose "
            "whole interval beats the ideal is marked: it is an error to explain, most likely a slow dense arm.",
            "Model FLOPs / dense is counted, not timed. All blocks on is the measured ratio with nothing left out: "
            "what routing itself costs.",
            "Active FFN is the share of all FFN neurons, of all layers, that ran.",
            "dense and dense_same_tokens stand at ratio 1 by definition.",
            "Points are means over seeds. Their intervals are 95 % over seeds (Student t); with one seed, the interval "
            "of a ratio is over its timing samples, and a quality has none.",
            "A point is on the front when no other is at least as good in both and better in one. With two seeds or "
            "more, the share of bootstrap draws of the seeds in which it stays there is given too.",
            f"Hypervolume: area between front and reference point, quality {reference.quality_cost:g}× and time "
            f"{reference.latency_ratio:g}× of dense, both axes in units of dense.",
        ]
    ) + (
        '<p>The same numbers, one row per seed and timed cell: <a href="table.csv">table.csv</a>, table.parquet. Every '
        'routed point beside its controls: <a href="pays.csv">pays.csv</a>, pays.parquet. Pictures: '
        + ", ".join(f'<a href="{name}">{name}</a>' for name in pictures)
        + ".</p>"
    )


def _facts(runs: LoadedRuns) -> str:
    parts = []
    for title, part in (("Protocol", "protocol"), ("Environment", "environment")):
        facts = shared_facts(runs.experiments, part)
        items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(_values(values))}</dd>" for key, values in facts)
        parts.append(f"<h3>{title}</h3><dl>{items}</dl>" if items else "")
    costs = stage_costs(runs.experiments).to_dict("records")
    if costs:
        rows = [
            [
                escape(str(row["stage"])),
                str(row["stages"]),
                fmt.significant(row["wall_seconds"], 3),
                fmt.significant(row["cpu_seconds"], 3),
                fmt.significant(row["peak_rss_bytes"] / 2**30, 3),
            ]
            for row in costs
        ]
        heads = ["stage", "how many", "wall seconds", "CPU seconds", "peak GiB"]
        parts.append("<h3>Computing</h3>" + fixed_table(heads, rows, text={0}, label="Seconds of every stage"))
    return "".join(parts)


def _values(values: list[str]) -> str:
    shown = " | ".join(values[:_MOST_VALUES])
    return shown if len(values) <= _MOST_VALUES else f"{shown} | and {len(values) - _MOST_VALUES} more"


def _words(name: str) -> str:
    return name.replace("_", " ")
