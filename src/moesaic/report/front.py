"""Pareto fronts over quality and measured time, one per setting (model, machine) and speed cell, on seed means.

Both coordinates are made costs (lower is better). The dense model and dense_same_tokens stand at ratio 1 by
definition: they *are* the dense arm, and the noise of timing a model against itself must not put them on a front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import moocore
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moesaic.report.columns import Quality
from moesaic.report.summary import (
    CELL_KEYS,
    DENSE_METHODS,
    deployed,
    in_reading_order,
    own_timings,
    summarise,
    summarise_points,
    usable_points,
)

__all__ = [
    "FRONT_KEYS",
    "ReferencePoint",
    "cell_label",
    "dense_quality",
    "fronts",
    "fronts_by_quality",
    "hypervolume",
    "hypervolumes",
    "membership",
    "nondominated",
]

FRONT_KEYS = ("setting", *CELL_KEYS)


@dataclass(frozen=True, slots=True)
class ReferencePoint:
    """The corner that hypervolumes are measured from, in units of the dense model.

    Choose it before results exist: moving it afterwards can change which method has the larger volume.
    """

    quality_cost: float = 2.0  # perplexity / dense perplexity, or dense accuracy / accuracy
    latency_ratio: float = 1.25  # measured time / dense time

    def __post_init__(self) -> None:
        if not (self.quality_cost > 0 and self.latency_ratio > 0):
            raise ValueError(
                f"reference point ({self.quality_cost}, {self.latency_ratio}): both must be above 0, in units of dense"
            )


def fronts(table: pd.DataFrame, quality: Quality, *, resamples: int = 400, seed: int = 0) -> pd.DataFrame:
    """Every candidate of every front over `quality`, with `on_front` and `membership_frac`.

    `table` is the tidy table. Columns beside those of `summarise`: `value`, `value_low`, `value_high` (the quality),
    `on_front`, `membership_frac` (share of `resamples` bootstrap draws of seeds in which the point is on the front;
    empty where no candidate has two seeds).
    """
    return fronts_by_quality(table, [quality], resamples=resamples, seed=seed)[quality.name]


def fronts_by_quality(
    table: pd.DataFrame, shown: Sequence[Quality], *, resamples: int = 400, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """`fronts` for each of `shown`, by its name."""
    timed = _timed(table)
    columns = [quality.column for quality in shown]
    draws = _seed_draws(table, columns) if table["seed"].nunique() > 1 else {}
    found = {}
    for number, quality in enumerate(shown):
        candidates = _with_value(timed, quality)
        parts = []
        for _, group in candidates.groupby(list(FRONT_KEYS), dropna=False, sort=False):
            seeds = [_draws_of(row, draws, number) for row in _plain_rows(group)]
            generator = np.random.default_rng(seed)
            share = membership(seeds, maximise_quality=quality.maximise, resamples=resamples, generator=generator)
            on_front = nondominated(group[["value", "ratio"]].to_numpy(), maximise_quality=quality.maximise)
            parts.append(group.assign(on_front=on_front, membership_frac=share))
        empty = candidates.assign(on_front=False, membership_frac=np.nan)
        found[quality.name] = pd.concat(parts, ignore_index=True) if parts else empty
    return found


def nondominated(points: ArrayLike, *, maximise_quality: bool) -> NDArray[np.bool_]:
    """Boolean (points,): which of the (quality, ratio) rows no other row dominates. Of equal rows all are kept."""
    array = np.asarray(points, dtype=float).reshape(-1, 2)
    if len(array) == 0:
        return np.zeros(0, dtype=bool)
    return np.asarray(moocore.is_nondominated(array, maximise=[maximise_quality, False], keep_weakly=True), dtype=bool)


def membership(
    seeds: list[NDArray[np.float64]], *, maximise_quality: bool, resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Share of bootstrap draws in which each candidate is on the front.

    `seeds[i]` is (seeds, 2): quality and ratio of candidate i per seed; the two are drawn together. Only the scatter
    between seeds is in it. All NaN where no candidate has two seeds.
    """
    if not any(len(values) > 1 for values in seeds):
        return np.full(len(seeds), np.nan)
    means = np.stack([_resampled_means(values, resamples, generator) for values in seeds], axis=1)
    hits = sum(nondominated(draw, maximise_quality=maximise_quality).astype(float) for draw in means)
    return np.asarray(hits, dtype=float) / resamples


def hypervolume(points: ArrayLike, reference: ReferencePoint) -> float:
    """Area that (quality cost, latency ratio) rows dominate below `reference`, both in units of dense. 0 if none."""
    array = np.asarray(points, dtype=float).reshape(-1, 2)
    corner = np.array([reference.quality_cost, reference.latency_ratio])
    inside = array[np.isfinite(array).all(axis=1) & (array < corner).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=corner)) if len(inside) else 0.0


def hypervolumes(candidates: pd.DataFrame, quality: Quality, reference: ReferencePoint) -> pd.DataFrame:
    """Hypervolume of each front of `fronts(...)`, and of the dense model alone; empty where dense was not evaluated."""
    rows = []
    for keys, group in candidates.groupby(list(FRONT_KEYS), dropna=False, sort=False):
        dense = dense_quality(group)
        cost = dense / group["value"] if quality.maximise else group["value"] / dense
        points = np.column_stack([cost, group["ratio"]])
        rows.append(
            dict(zip(FRONT_KEYS, keys, strict=True))
            | {
                "candidates": len(group),
                "on_front": int(group["on_front"].sum()),
                "hypervolume": np.nan if np.isnan(dense) else hypervolume(points, reference),
                "dense_hypervolume": np.nan if np.isnan(dense) else hypervolume([[1.0, 1.0]], reference),
            }
        )
    return pd.DataFrame(rows)


def dense_quality(candidates: pd.DataFrame) -> float:
    """Quality of the untouched dense model among `candidates` (one model's); NaN where it was not evaluated."""
    dense = candidates.loc[candidates["method"] == "dense", "value"]
    return float(dense.iloc[0]) if len(dense) else float("nan")


def cell_label(phase: object, batch_size: object, tokens: object, context_tokens: object) -> str:
    """A speed cell in words: "prefill, batch 1, 512 tokens" or "decode, batch 8, after 128 tokens"."""
    words = [str(phase), f"batch {batch_size}"]
    if phase == "decode" and _given(context_tokens):
        words.append(f"after {context_tokens} tokens")
    elif _given(tokens):
        words.append(f"{tokens} tokens")
    return ", ".join(words)


def _given(value: object) -> bool:
    return value is not None and not pd.isna(value)  # type: ignore[call-overload]


def _timed(table: pd.DataFrame) -> pd.DataFrame:
    """Seed means of what could be deployed, per timed cell; dense-shaped controls stand at ratio 1 in every cell."""
    means = summarise(table)
    measured = deployed(means[~means["method"].isin(DENSE_METHODS)])
    cells = means.loc[means["ratio"].notna(), ["model", "machine", *FRONT_KEYS]].drop_duplicates()
    points = summarise_points(table)
    dense = points[points["method"].isin(DENSE_METHODS)]
    by_definition = dense.merge(cells, on="model").assign(ratio=1.0)
    return in_reading_order(pd.concat([by_definition, measured], ignore_index=True))


def _with_value(timed: pd.DataFrame, quality: Quality) -> pd.DataFrame:
    ends = {f"value{end}": timed[f"{quality.column}{end}"] for end in ("", "_low", "_high")}
    candidates = timed.assign(**ends)
    finite = np.isfinite(candidates[["value", "ratio"]].to_numpy(dtype=float)).all(axis=1)
    return candidates.loc[finite].reset_index(drop=True)


_POINT = ("configuration", "arm", "budget")
_CELL = (*_POINT, *FRONT_KEYS)


def _plain_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    columns = [*_CELL, "method", "value", "ratio"]
    return [dict(zip(columns, row, strict=True)) for row in frame[columns].itertuples(index=False, name=None)]


def _seed_draws(table: pd.DataFrame, columns: Sequence[str]) -> dict[tuple[object, ...], NDArray[np.float64]]:
    """Ratio and `columns` per seed, (seeds, 1 + columns): by cell, and by point alone for dense-shaped methods."""
    draws = {}
    names = ["ratio", *columns]
    for keys, group in own_timings(table).groupby(list(_CELL), dropna=False):
        draws[_key(keys)] = group[names].to_numpy(dtype=float, na_value=np.nan)
    dense = usable_points(table[table["method"].isin(DENSE_METHODS)]).assign(ratio=1.0)
    for keys, group in dense.groupby(list(_POINT), dropna=False):
        draws[_key(keys)] = group[names].to_numpy(dtype=float, na_value=np.nan)
    return draws


def _draws_of(
    row: Mapping[str, Any], draws: Mapping[tuple[object, ...], NDArray[np.float64]], number: int
) -> NDArray[np.float64]:
    """(seeds, 2) quality and ratio of a candidate; its mean alone where no seed has both."""
    names = _POINT if row["method"] in DENSE_METHODS else _CELL
    values = draws.get(_key(tuple(row[name] for name in names)), np.empty((0, 2 + number)))[:, [1 + number, 0]]
    values = values[np.isfinite(values).all(axis=1)]
    return values if len(values) else np.array([[row["value"], row["ratio"]]], dtype=float)


def _key(values: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(value if _given(value) else None for value in values)


def _resampled_means(
    values: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    picks = generator.integers(0, len(values), size=(resamples, len(values)))
    return np.asarray(values[picks].mean(axis=1), dtype=float)
