"""Everything that terminal, pictures and page show, computed once from loaded records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from moesaic.report.columns import Quality, find_quality, qualities
from moesaic.report.front import ReferencePoint, fronts_by_quality
from moesaic.report.gaps import gap_table
from moesaic.report.load import LoadedRuns
from moesaic.report.pays import pays_table
from moesaic.report.summary import summarise_points

__all__ = ["Results", "analyse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Fronts over every quality that was measured, the gap ladder, and whether routing pays."""

    runs: LoadedRuns
    quality: Quality  # what pictures and the terminal show, and the page first
    qualities: tuple[Quality, ...]
    fronts: Mapping[str, pd.DataFrame]  # by the name of the quality
    reference: ReferencePoint
    gap_quality: Quality
    gaps: pd.DataFrame
    points: pd.DataFrame  # seed means of all arms, timed or not
    pays: pd.DataFrame  # columns: moesaic.report.pays.PAYS_COLUMNS

    @property
    def candidates(self) -> pd.DataFrame:
        """The fronts over `quality`."""
        return self.fronts[self.quality.name]


def analyse(runs: LoadedRuns, quality: str = "perplexity", reference: ReferencePoint | None = None) -> Results:
    """Fronts, gaps and paired comparisons of `runs`; `quality` names what is shown first.

    Gaps are of the loss in nats, whose differences add up, or of `quality` where no loss was measured.
    Raises: ValueError for a quality that these records do not have.
    """
    table = runs.table
    chosen = find_quality(quality, table.columns)
    measured = tuple(one for one in qualities(table.columns) if one == chosen or table[one.column].notna().any())
    has_loss = table["nats_per_token"].notna().any()
    gap_quality = find_quality("nats_per_token", table.columns) if has_loss else chosen
    return Results(
        runs=runs,
        quality=chosen,
        qualities=measured,
        fronts=fronts_by_quality(table, measured),
        reference=reference or ReferencePoint(),
        gap_quality=gap_quality,
        gaps=gap_table(table, gap_quality),
        points=summarise_points(table),
        pays=pays_table(runs),
    )
