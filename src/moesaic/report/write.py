"""Everything a report consists of, written into one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moesaic.report.columns import Quality, find_quality
from moesaic.report.figures import draw_fronts, save_png
from moesaic.report.front import ReferencePoint, fronts
from moesaic.report.gap_figure import draw_gaps
from moesaic.report.gaps import gap_table
from moesaic.report.html import render
from moesaic.report.load import LoadedRuns
from moesaic.runs.atomic import open_atomic, write_text_atomic

__all__ = ["ReportFiles", "write_report"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFiles:
    """Where the parts of a report are."""

    page: Path
    pareto: Path
    gaps: Path
    parquet: Path
    csv: Path


def write_report(
    runs: LoadedRuns, out: Path, *, quality: Quality, reference: ReferencePoint | None = None
) -> ReportFiles:
    """Write report.html, pareto.png, gaps.png, table.parquet and table.csv into `out`, each in one step.

    Raises: OSError from the disk.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = ReportFiles(
        page=out / "report.html",
        pareto=out / "pareto.png",
        gaps=out / "gaps.png",
        parquet=out / "table.parquet",
        csv=out / "table.csv",
    )
    with open_atomic(paths.parquet) as file:
        runs.table.to_parquet(file, index=False)
    write_text_atomic(paths.csv, runs.table.to_csv(index=False))
    gap_quality = _gap_quality(runs.table, quality)
    gaps = gap_table(runs.table, gap_quality)
    save_png(draw_fronts(fronts(runs.table, quality), quality), paths.pareto)
    save_png(draw_gaps(gaps, gap_quality), paths.gaps)
    page = render(runs, gaps, quality=quality, gap_quality=gap_quality, reference=reference or ReferencePoint())
    write_text_atomic(paths.page, page)
    return paths


def _gap_quality(table: pd.DataFrame, quality: Quality) -> Quality:
    """Loss in nats, whose differences add up; the front's own quality where no loss was measured."""
    return find_quality("nats_per_token", table.columns) if table["nats_per_token"].notna().any() else quality
