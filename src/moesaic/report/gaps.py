"""Where the loss comes from: dense -> oracle routing -> learned router -> adapted -> dense_same_tokens.

Every rung is a quality on the same held-out data; a gap is the difference of two rungs, so the gaps add up. Beside
the ladder stands static_slice, no routing at the same active width: below it no conversion is worth its router.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moesaic.report.columns import Quality
from moesaic.report.summary import in_reading_order, mean_interval, routed, summarise_points, usable_points

__all__ = ["GAPS", "RUNGS", "Gap", "gap_table", "visible_limit"]

RUNGS = (
    "dense",
    "prepared_dense",
    "oracle_router",
    "random_router",
    "learned_router",
    "adapted",
    "all_blocks",
    "dense_same_tokens",
    "static_slice",
)
_OWN_ARMS = ("adapted", "learned_router", "oracle_router", "random_router", "all_blocks")

# A fraction of a dense FFN within which two methods count as equally wide, and two runs as equally long.
_SAME_WIDTH = 0.02
_SAME_TOKENS = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """A difference of two rungs, `upper` minus `lower`, and what it tells.

    "start" is the dense model that was cut: the prepared one where there is one. "final" is what would be deployed:
    the adapted model, or the learned router of a method that trains nothing after.
    """

    name: str
    upper: str
    lower: str
    meaning: str


GAPS = (
    Gap(
        name="prepare_gap",
        upper="prepared_dense",
        lower="dense",
        meaning="lost by changing the dense model before the cut (ReLU in place of its own activation)",
    ),
    Gap(
        name="partition_gap",
        upper="oracle_router",
        lower="start",
        meaning="lost although every token gets its best blocks: partition and budget",
    ),
    Gap(name="router_gap", upper="learned_router", lower="oracle_router", meaning="lost by the router's mistakes"),
    Gap(name="adaptation_gap", upper="adapted", lower="learned_router", meaning="changed by training after conversion"),
    Gap(
        name="dense_tokens_gap",
        upper="adapted",
        lower="dense_same_tokens",
        meaning="left, against the dense model trained on the same tokens",
    ),
    Gap(
        name="routing_gain",
        upper="static_slice",
        lower="final",
        meaning="what the finished method gains over a static slice of the same width; above 0, routing pays",
    ),
)


def gap_table(table: pd.DataFrame, quality: Quality) -> pd.DataFrame:
    """One row per model, configuration and budget of each routed method, from the tidy table.

    Columns: model, label, method, knob, budget, active_ffn_frac, seeds; each of RUNGS (mean over seeds, in the unit of
    `quality`); each gap of GAPS with `_low` and `_high` (95 % over seeds, of differences within a seed where both
    rungs have the same seeds); `notes`, where a control was not run at quite the same width or tokens. What was not
    measured is empty.
    """
    points = summarise_points(table)
    seeds = _seed_values(table, quality)
    rows = []
    for _, group in _routed(points).groupby(["model", "configuration", "budget"], dropna=False, sort=False):
        arms: dict[str, Mapping[str, Any]] = {str(row["arm"]): row for row in group.to_dict("records")}  # type: ignore[misc]
        lead = next(arms[arm] for arm in _OWN_ARMS if arm in arms)
        rungs, notes = _rungs(arms, lead, points[points["model"] == lead["model"]])
        series = {name: seeds.get(_seed_key(rung)) for name, rung in rungs.items()}
        rows.append(_row(lead, rungs, series, quality) | {"notes": "; ".join(notes)})
    gaps = in_reading_order(pd.DataFrame(rows, columns=_columns()))
    order = {model: index for index, model in enumerate(table["model"].unique())}
    return gaps.sort_values("model", key=lambda models: models.map(order), kind="stable").reset_index(drop=True)


def visible_limit(gaps: pd.DataFrame, quality: Quality) -> float:
    """The worst value that a picture of `gaps` should reach: an untrained router must not squeeze the rest.

    It is dense plus four times the median loss of the rungs that are meant to be good. NaN where nothing is beyond it.
    """
    sign = -1.0 if quality.maximise else 1.0
    excess = gaps[list(RUNGS)].sub(gaps["dense"], axis=0) * sign
    reach = 4 * excess[["oracle_router", "adapted", "static_slice"]].stack().median()
    cut = reach > 0 and excess.max().max() > reach
    return float(gaps["dense"].iloc[0] + sign * reach) if cut else float("nan")


def _columns() -> list[str]:
    gaps = [f"{gap.name}{end}" for gap in GAPS for end in ("", "_low", "_high")]
    return ["model", "label", "method", "knob", "budget", "active_ffn_frac", "seeds", *RUNGS, *gaps, "notes"]


def _routed(points: pd.DataFrame) -> pd.DataFrame:
    return routed(points[points["arm"].isin(_OWN_ARMS)])


def _rungs(
    arms: Mapping[str, Mapping[str, Any]], lead: Mapping[str, Any], points: pd.DataFrame
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The summary row of each rung that exists, and remarks on controls that do not quite match."""
    rungs = {name: arms[name] for name in _OWN_ARMS if name in arms}
    if lead["arm"] in ("adapted", "learned_router"):
        rungs["final"] = lead
    prepared = points[(points["configuration"] == lead["configuration"]) & (points["arm"] == "prepared_dense")]
    dense = points[points["method"] == "dense"]
    same_tokens = points[points["method"] == "dense_same_tokens"]
    sliced = points[(points["method"] == "static_slice") & (points["arm"] == "adapted")]
    width = (sliced["active_ffn_frac"] - lead["active_ffn_frac"]).abs()
    found = {
        "dense": dense,
        "prepared_dense": prepared,
        "start": prepared if len(prepared) else dense,
        "dense_same_tokens": _nearest_tokens(same_tokens, lead),
        "static_slice": _nearest_tokens(sliced[width <= _SAME_WIDTH], lead),
    }
    rungs |= {name: rows.to_dict("records")[0] for name, rows in found.items() if len(rows)}  # type: ignore[misc]
    return rungs, [note for name in ("dense_same_tokens", "static_slice") for note in _note(name, rungs, lead)]


def _nearest_tokens(candidates: pd.DataFrame, lead: Mapping[str, Any]) -> pd.DataFrame:
    """`candidates` by how near their adaptation tokens are to the method's own; those without tokens come last."""
    distance = (candidates["adaptation_tokens"] - lead["adaptation_tokens"]).abs()
    return candidates.loc[distance.sort_values(kind="stable", na_position="last").index]


def _note(name: str, rungs: Mapping[str, Mapping[str, Any]], lead: Mapping[str, Any]) -> list[str]:
    if name not in rungs:
        return []
    control, own = rungs[name]["adaptation_tokens"], lead["adaptation_tokens"]
    if pd.isna(control) or pd.isna(own) or abs(control - own) <= _SAME_TOKENS * max(control, own):
        return []
    return [f"{name} was trained on {control:,.0f} tokens, this on {own:,.0f}"]


def _row(
    lead: Mapping[str, Any],
    rungs: Mapping[str, Mapping[str, Any]],
    series: Mapping[str, pd.Series | None],
    quality: Quality,
) -> dict[str, Any]:
    row = {key: lead[key] for key in ("model", "label", "method", "knob", "budget", "active_ffn_frac", "seeds")}
    values = {name: rung[quality.column] for name, rung in rungs.items()}
    missing = float("nan")
    row |= {name: values.get(name, missing) for name in RUNGS}
    for gap in GAPS:
        low, high = _paired_interval(series.get(gap.upper), series.get(gap.lower))
        value = values.get(gap.upper, missing) - values.get(gap.lower, missing)
        row |= {gap.name: value, f"{gap.name}_low": low, f"{gap.name}_high": high}
    return row


def _paired_interval(upper: pd.Series | None, lower: pd.Series | None) -> tuple[float, float]:
    """95 % interval of the difference over seeds; empty unless both rungs have the same two or more seeds."""
    if upper is None or lower is None or len(upper) < 2 or set(upper.index) != set(lower.index):
        return float("nan"), float("nan")
    return mean_interval(list(upper - lower))[1:]


def _seed_values(table: pd.DataFrame, quality: Quality) -> dict[tuple[object, ...], pd.Series]:
    once = usable_points(table[table[quality.column].notna()])
    groups = once.groupby(["configuration", "arm", "budget"], dropna=False)
    return {_plain(keys): group.groupby("seed")[quality.column].mean().astype(float) for keys, group in groups}


def _seed_key(rung: Mapping[str, Any]) -> tuple[object, ...]:
    return _plain((rung["configuration"], rung["arm"], rung["budget"]))


def _plain(keys: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(None if pd.isna(key) else key for key in keys)  # type: ignore[call-overload]
