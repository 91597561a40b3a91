"""Paired comparisons: two models' scores of the very same documents or items, and the interval of their difference.

Shapes: U units (documents, windows of documents, or items), C comparisons, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["FEW_UNITS", "Scores", "UnlikeScoresError", "bootstrap_intervals", "combine"]

FEW_UNITS = 8  # with fewer documents, their windows are resampled instead
_CHUNK = 64  # resamples at a time


class UnlikeScoresError(ValueError):
    """Two models were scored on different units, so that nothing can be paired."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """A score summed over each unit, and what its mean is taken over: tokens of a document, 1 for an item.

    `finer` is the same score over smaller units, if it was kept: the windows of the documents.
    """

    kind: str  # what a unit is: "documents", "windows" or "items"
    unit_U: pd.Index
    sum_U: NDArray[np.float64]
    weight_U: NDArray[np.float64]
    finer: Scores | None = None

    @property
    def mean(self) -> float:
        """The score per token, or per item."""
        return float(self.sum_U.sum() / self.weight_U.sum())

    @property
    def resampled(self) -> Scores:
        """The units to resample: these, or the finer ones where these are few."""
        return self.finer if self.finer is not None and len(self.unit_U) < FEW_UNITS else self


def combine(parts: Sequence[tuple[float, Scores]]) -> Scores:
    """The weighted sum of scores, unit by unit: a difference, a mean over seeds, or a point between two widths.

    Raises: UnlikeScoresError where the units or their weights are not the same.
    """
    first = parts[0][1]
    for _, other in parts[1:]:
        if not first.unit_U.equals(other.unit_U) or not np.array_equal(first.weight_U, other.weight_U):
            raise UnlikeScoresError(f"scored on other {first.kind}")
    finer = [(factor, scores.finer) for factor, scores in parts if scores.finer is not None]
    return Scores(
        kind=first.kind,
        unit_U=first.unit_U,
        sum_U=np.sum([factor * scores.sum_U for factor, scores in parts], axis=0),
        weight_U=first.weight_U,
        finer=combine(finer) if len(finer) == len(parts) else None,
    )


def bootstrap_intervals(
    scores: Sequence[Scores], *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> list[tuple[float, float]]:
    """Percentile intervals of the means of `scores` when their units are drawn again with replacement.

    Scores of the same units share every draw. An interval of fewer than two units is NaN.
    """
    found = [(math.nan, math.nan)] * len(scores)
    for members in _of_same_units(scores):
        own = [scores[index].resampled for index in members]
        if len(own[0].unit_U) < 2:
            continue
        means_RC = _resampled_means(np.stack([one.sum_U for one in own], axis=1), own[0].weight_U, resamples, seed)
        low_C, high_C = np.quantile(means_RC, [(1 - level) / 2, (1 + level) / 2], axis=0)
        for index, low, high in zip(members, low_C, high_C, strict=True):
            found[index] = (float(low), float(high))
    return found


def _of_same_units(scores: Sequence[Scores]) -> list[list[int]]:
    groups: list[list[int]] = []
    for index, one in enumerate(scores):
        own = one.resampled
        for group in groups:
            other = scores[group[0]].resampled
            if own.unit_U.equals(other.unit_U) and np.array_equal(own.weight_U, other.weight_U):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _resampled_means(
    sum_UC: NDArray[np.float64], weight_U: NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    units = len(weight_U)
    means = []
    for begin in range(0, resamples, _CHUNK):
        picks_RU = generator.integers(0, units, size=(min(_CHUNK, resamples - begin), units))
        times_RU = np.stack([np.bincount(picks_U, minlength=units) for picks_U in picks_RU]).astype(float)
        means.append((times_RU @ sum_UC) / (times_RU @ weight_U)[:, None])
    return np.concatenate(means)
