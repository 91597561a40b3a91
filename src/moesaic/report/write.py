"""Everything a report consists of, written into one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesaic.report.canvas import save_png
from moesaic.report.front_figure import draw_fronts
from moesaic.report.gap_figure import draw_gaps
from moesaic.report.html import render
from moesaic.report.results import Results
from moesaic.report.share_figure import draw_shares
from moesaic.runs.atomic import open_atomic, write_text_atomic

__all__ = ["ReportFiles", "write_report"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFiles:
    """Where the parts of a report are."""

    page: Path
    shares: Path
    pareto: Path | None  # None where nothing was timed
    gaps: Path
    pays: Path
    pays_csv: Path
    parquet: Path
    csv: Path


def write_report(results: Results, out: Path) -> ReportFiles:
    """Write the page, the pictures and the tables into `out`, each in one step.

    Where nothing was timed there is no pareto.png, and one of an earlier report is removed.
    Raises: OSError from the disk.
    """
    out.mkdir(parents=True, exist_ok=True)
    pareto = out / "pareto.png"
    paths = ReportFiles(
        page=out / "report.html",
        shares=out / "share.png",
        pareto=None if results.candidates.empty else pareto,
        gaps=out / "gaps.png",
        pays=out / "pays.parquet",
        pays_csv=out / "pays.csv",
        parquet=out / "table.parquet",
        csv=out / "table.csv",
    )
    for table, parquet, csv in (
        (results.runs.table, paths.parquet, paths.csv),
        (results.pays, paths.pays, paths.pays_csv),
    ):
        with open_atomic(parquet) as file:
            table.to_parquet(file, index=False)
        write_text_atomic(csv, table.to_csv(index=False))
    if paths.pareto is None:
        pareto.unlink(missing_ok=True)
    else:
        save_png(draw_fronts(results.candidates, results.quality), paths.pareto)
    save_png(draw_shares(results.points, results.quality), paths.shares)
    save_png(draw_gaps(results.gaps, results.gap_quality), paths.gaps)
    write_text_atomic(paths.page, render(results))
    return paths
