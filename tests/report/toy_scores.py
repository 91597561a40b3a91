"""Scores of a few units for tests of paired comparisons."""

import numpy as np
import pandas as pd

from moesaic.report.paired import Scores


def scores(sum_U: object, weight_U: object = None, *, finer: Scores | None = None, first: int = 0) -> Scores:
    """Units `first`, `first` + 1, ... with weight 1 unless told."""
    values = np.asarray(sum_U, dtype=float)
    weights = np.ones(len(values)) if weight_U is None else np.asarray(weight_U, dtype=float)
    unit_U = pd.RangeIndex(first, first + len(values))
    return Scores(kind="documents", unit_U=unit_U, sum_U=values, weight_U=weights, finer=finer)
