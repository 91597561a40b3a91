"""Everything a report consists of, written into one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesaic.report.canvas import save_png
from moesaic.report.front_figure import draw_fronts
from moesaic.report.gap_figure import draw_gaps
from moesaic.report.html import render
from moesaic.report.results import Results
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


def write_report(results: Results, out: Path) -> ReportFiles:
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
        results.runs.table.to_parquet(file, index=False)
    write_text_atomic(paths.csv, results.runs.table.to_csv(index=False))
    save_png(draw_fronts(results.candidates, results.quality), paths.pareto)
    save_png(draw_gaps(results.gaps, results.gap_quality), paths.gaps)
    write_text_atomic(paths.page, render(results))
    return paths
