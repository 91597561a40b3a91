"""Seed means of the tidy table: one row per configuration, arm, budget and speed cell, with named intervals.

A mean of a column `x` is in `x`, its 95 % interval in `x_low` and `x_high`. Intervals over seeds are Student t, and
empty with one seed. The ratio of a single seed keeps the interval of its own timing samples; `ratio_interval_over`
says which one a row has ("seeds" or "timing samples").
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from scipy import stats

__all__ = [
    "CELL_KEYS",
    "CONTROL_METHODS",
    "DENSE_METHODS",
    "PLACE_KEYS",
    "POINT_KEYS",
    "deployed",
    "failures",
    "in_reading_order",
    "mean_interval",
    "own_timings",
    "routed",
    "summarise",
    "summarise_points",
    "usable_points",
]

POINT_KEYS = (
    "model",
    "label",
    "configuration",
    "method",
    "variant",
    "provenance",
    "arm",
    "knob",
    "budget",
)
PLACE_KEYS = ("setting", "machine")
CELL_KEYS = ("phase", "batch_size", "tokens", "context_tokens")

# Dense-shaped controls of every study (DESIGN, controls): by construction they take as long as the dense arm.
DENSE_METHODS = ("dense", "dense_same_tokens")
CONTROL_METHODS = (*DENSE_METHODS, "static_slice", "static_depth")

_SPEED = ("ideal_ratio", "captured_share_frac", "dense_ms", "sparse_ms")
_COST = (
    "active_ffn_frac",
    "parameters_total",
    "parameters_active",
    "ffn_flops_per_token",
    "router_flops_per_token",
    "model_flops_per_token",
    "dense_model_flops_per_token",
    "adaptation_tokens",
)
_LANGUAGE = ("nats_per_token", "perplexity", "bits_per_byte")


def usable_points(table: pd.DataFrame) -> pd.DataFrame:
    """One row per experiment, arm and budget that has a result; speed columns are those of one cell, if any."""
    return _usable(table).drop_duplicates(["identity", "arm", "budget"])


def own_timings(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with a result that time the model's own routing, or nothing.

    Where a cell was timed with several executors, the first one listed counts: it is the one to be deployed.
    """
    usable = _usable(table)
    own = usable[usable["control"].isna() | (usable["control"] == "own")]
    return own.drop_duplicates(["identity", "arm", "budget", *CELL_KEYS])


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Seed means per configuration, arm, budget and speed cell, of points that have a result.

    Times are of the model's own routing; the mean ratio with all blocks active stands beside it in
    `all_blocks_ratio` where it was measured.
    """
    own, usable = own_timings(table), _usable(table)
    keys = [*POINT_KEYS, *PLACE_KEYS, *CELL_KEYS]
    means = _seed_means(own, keys, [*_quality(table), *_COST, "ratio", *_SPEED])
    means = _timing_interval(means, own, keys)
    overhead = usable[usable["control"] == "all_blocks"]
    all_blocks = overhead.groupby(keys, dropna=False, sort=False)["ratio"].mean().rename("all_blocks_ratio")
    return means.merge(all_blocks.reset_index(), on=keys, how="left")


def summarise_points(table: pd.DataFrame) -> pd.DataFrame:
    """Seed means of quality and cost per configuration, arm and budget, whether or not the point was timed."""
    return _seed_means(usable_points(table), list(POINT_KEYS), [*_quality(table), *_COST])


def deployed(means: pd.DataFrame) -> pd.DataFrame:
    """The rows of `means` that somebody could run: not the oracle, random and all-blocks controls.

    A learned router before adaptation counts only where its configuration is never adapted.
    """
    adapted = means[means["arm"] == "adapted"]
    finished = set(zip(adapted["configuration"], adapted["budget"].fillna(-1.0), strict=True))
    keys = zip(means["configuration"], means["budget"].fillna(-1.0), strict=True)
    router_only = (means["arm"] == "learned_router") & pd.Series([k not in finished for k in keys], index=means.index)
    return means[means["arm"].isin(["dense", "adapted"]) | router_only]


def routed(points: pd.DataFrame) -> pd.DataFrame:
    """The rows of `points` whose method chooses per token: not dense, and no static control."""
    static = points["method"].isin(DENSE_METHODS) | points["method"].str.startswith("static_")
    return points[~static]


def in_reading_order(means: pd.DataFrame) -> pd.DataFrame:
    """`means` with the controls first, then methods by label, each from its widest budget down."""
    rank = {name: index for index, name in enumerate(CONTROL_METHODS)}
    order = means.assign(_rank=means["method"].map(rank).fillna(len(rank)))
    order = order.sort_values(["_rank", "label", "active_ffn_frac"], ascending=[True, True, False], kind="stable")
    return order.drop(columns="_rank")


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and the ends of its Student t interval at `level`; the ends are NaN for fewer than two values."""
    series = pd.Series(values, dtype="float64")
    half = _half_width(series.std(ddof=1), series.count(), level)
    return float(series.mean()), float(series.mean() - half), float(series.mean() + half)


def failures(table: pd.DataFrame) -> pd.DataFrame:
    """The points of which something failed: experiment, seed, label, arm, budget, reason and message."""
    columns = ["experiment", "seed", "model", "label", "arm", "budget", "failure_reason", "failure_message"]
    failed = table[table["failure_reason"].notna()]
    return failed.drop_duplicates(["identity", "arm", "budget"])[columns].reset_index(drop=True)


def _usable(table: pd.DataFrame) -> pd.DataFrame:
    # A point whose timing failed keeps its quality.
    return table[table["failure_reason"].isna() | table["nats_per_token"].notna()]


def _quality(table: pd.DataFrame) -> list[str]:
    return [*_LANGUAGE, *(name for name in table.columns if name.startswith("task."))]


def _seed_means(rows: pd.DataFrame, keys: list[str], columns: list[str]) -> pd.DataFrame:
    numeric = rows.assign(**{column: rows[column].astype("float64") for column in columns})
    groups = numeric.groupby(keys, dropna=False, sort=False)
    mean, spread, count = groups[columns].mean(), groups[columns].std(ddof=1), groups[columns].count()
    half = spread * stats.t.ppf(0.975, (count - 1).where(count > 1)) / count**0.5
    low, high = (mean - half).add_suffix("_low"), (mean + half).add_suffix("_high")
    text = groups.agg(
        seeds=("seed", "nunique"),
        experiments=("experiment", _joined),
        executor=("executor", _joined),
        num_blocks=("num_blocks", "first"),
        block_size=("block_size", "first"),
    )
    return pd.concat([mean, low, high, text], axis=1).reset_index()


def _joined(names: pd.Series) -> str:
    return ", ".join(dict.fromkeys(str(name) for name in names.dropna()))


def _timing_interval(means: pd.DataFrame, own: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Where only one seed was timed, the interval of the ratio over that seed's timing samples."""
    timing = own.groupby(keys, dropna=False, sort=False)[["ratio_low", "ratio_high"]].mean()
    merged = means.merge(timing.reset_index(), on=keys, how="left", suffixes=("", "_timing"))
    single = merged["ratio_low"].isna()
    over = merged["ratio"].notna().map({True: "seeds", False: None})
    return merged.assign(
        ratio_interval_over=over.mask(single & merged["ratio_low_timing"].notna(), "timing samples"),
        ratio_low=merged["ratio_low"].fillna(merged["ratio_low_timing"]),
        ratio_high=merged["ratio_high"].fillna(merged["ratio_high_timing"]),
    ).drop(columns=["ratio_low_timing", "ratio_high_timing"])


def _half_width(spread: float, count: int, level: float) -> float:
    return float(spread * stats.t.ppf(0.5 + level / 2, count - 1) / count**0.5) if count > 1 else float("nan")
