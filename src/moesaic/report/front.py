"""Pareto fronts over quality and measured time, one per setting (model, machine) and speed cell, on seed means.

Both coordinates are made costs (lower is better). The dense model and dense_same_tokens stand at ratio 1 by
definition: they *are* the dense arm, and the noise of timing a model against itself must not put them on a front.
"""

from __future__ import annotations

from dataclasses import dataclass

import moocore
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moesaic.report.columns import Quality
from moesaic.report.summary import CELL_KEYS, DENSE_METHODS, deployed, in_reading_order, summarise, summarise_points

__all__ = [
    "FRONT_KEYS",
    "ReferencePoint",
    "cell_label",
    "dense_quality",
    "fronts",
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
    """Every candidate of every front, with `on_front` and `membership_frac`.

    `table` is the tidy table. Columns beside those of `summarise`: `value`, `value_low`, `value_high` (the quality),
    `on_front`, `membership_frac` (share of `resamples` bootstrap draws of seeds in which the point is on the front;
    empty where no candidate has two seeds).
    """
    candidates = _candidates(table, quality)
    draws = _seed_draws(table, quality)
    parts = []
    for _, group in candidates.groupby(list(FRONT_KEYS), dropna=False, sort=False):
        points = group[["value", "ratio"]].to_numpy(dtype=float)
        seeds = [_draws_of({str(key): value for key, value in row.items()}, draws) for row in group.to_dict("records")]
        generator = np.random.default_rng(seed)
        parts.append(
            group.assign(
                on_front=nondominated(points, maximise_quality=quality.maximise),
                membership_frac=membership(
                    seeds, maximise_quality=quality.maximise, resamples=resamples, generator=generator
                ),
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else candidates.assign(on_front=False, membership_frac=np.nan)


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


def _candidates(table: pd.DataFrame, quality: Quality) -> pd.DataFrame:
    means = summarise(table)
    measured = deployed(means[~means["method"].isin(DENSE_METHODS)])
    cells = means.loc[means["ratio"].notna(), ["model", "machine", *FRONT_KEYS]].drop_duplicates()
    points = summarise_points(table)
    dense = points[points["method"].isin(DENSE_METHODS)]
    by_definition = dense.merge(cells, on="model").assign(ratio=1.0)
    everything = pd.concat([by_definition, measured], ignore_index=True)
    everything = everything.assign(
        value=everything[quality.column],
        value_low=everything[f"{quality.column}_low"],
        value_high=everything[f"{quality.column}_high"],
    )
    finite = np.isfinite(everything[["value", "ratio"]].to_numpy(dtype=float)).all(axis=1)
    return in_reading_order(everything.loc[finite]).reset_index(drop=True)


_DRAW_KEYS = ("configuration", "arm", "budget", *CELL_KEYS)


def _seed_draws(table: pd.DataFrame, quality: Quality) -> dict[tuple[object, ...], NDArray[np.float64]]:
    """Quality and ratio per seed: keyed with the cell, and without it (all cell keys None) for dense-shaped methods."""
    usable = table[table["failure_reason"].isna()]
    own = usable[usable["control"].isna() | (usable["control"] == "own")]
    draws = {}
    for keys, group in own.groupby([*_DRAW_KEYS, "setting"], dropna=False):
        values = group[[quality.column, "ratio"]].to_numpy(dtype=float, na_value=np.nan)
        draws[_key(keys)] = values[np.isfinite(values).all(axis=1)]
    dense = usable[usable["method"].isin(DENSE_METHODS)].drop_duplicates(["identity", "arm", "budget"])
    for keys, group in dense.groupby(list(_DRAW_KEYS[:3]), dropna=False):
        quality_values = group[quality.column].dropna().to_numpy(dtype=float)
        draws[_key(keys)] = np.column_stack([quality_values, np.ones(len(quality_values))])
    return draws


def _draws_of(row: dict[str, object], draws: dict[tuple[object, ...], NDArray[np.float64]]) -> NDArray[np.float64]:
    names = _DRAW_KEYS[:3] if row["method"] in DENSE_METHODS else (*_DRAW_KEYS, "setting")
    values = draws[_key(tuple(row[name] for name in names))]
    return values if len(values) else np.array([[row["value"], row["ratio"]]], dtype=float)


def _key(values: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(value if _given(value) else None for value in values)


def _resampled_means(
    values: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    picks = generator.integers(0, len(values), size=(resamples, len(values)))
    return np.asarray(values[picks].mean(axis=1), dtype=float)
