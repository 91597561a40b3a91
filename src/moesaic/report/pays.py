"""Does routing pay? Every routed point beside a static slice of the same active width and the same adaptation tokens.

Scores are paired document by document (or item by item) within a seed. A difference is the method minus the control,
averaged over the seeds that have both; its interval is a bootstrap over documents (items), the same draw for all seeds.
The spread over seeds stands apart in `difference_seed_sd`. Few documents are resampled by their windows: such an
interval speaks of other passages of these documents, not of other documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from moesaic.report.facts import AdaptCost, seconds_per_token, stages_of
from moesaic.report.load import LoadedRuns
from moesaic.report.paired import Scores, UnlikeScoresError, bootstrap_intervals, combine
from moesaic.report.scores import LOSS, PointKey, ScoreKey, is_loss, point_key, read_scores
from moesaic.report.slices import NoControlError, Run, Slice, same_terms, slice_at
from moesaic.report.summary import deployed, in_reading_order, routed, usable_points

__all__ = ["LOSES", "OPEN", "PAYS", "PAYS_COLUMNS", "pays_table", "verdict"]

PAYS, LOSES, OPEN = "pays", "does not", "can't tell"

PAYS_COLUMNS = {
    "model": "backbone, with the corpus where there are several",
    "label": "method, with what tells it from the other configurations of that method",
    "configuration": "hash of the config without its seed",
    "method": "file name in conf/method",
    "variant": "as_published, as_released or corrected",
    "arm": "adapted, or learned_router for a method that trains nothing after",
    "knob": "name of the inference knob",
    "budget": "value of the inference knob",
    "active_ffn_frac": "FFN neurons that ran, of all layers' neurons, 0..1",
    "measure": "nats_per_token (less is better), <task>.acc or <task>.margin (more is better; margin in nats)",
    "seeds": "seeds of the method",
    "value": "the method's own, mean over seeds",
    "perplexity": "mean over seeds; of nats_per_token only",
    "slice": "the static slice at the same active share, mean over the paired seeds",
    "slice_from_frac": "active share of the slice, or of the narrower of the two that were interpolated between",
    "slice_to_frac": "active share of the slice, or of the wider of the two",
    "interpolated": "whether no slice was measured at this share",
    "paired_seeds": "seeds that have both method and slice",
    "difference": "method minus slice",
    "difference_low": "lower end of its 95 % paired bootstrap interval",
    "difference_high": "upper end",
    "difference_seed_sd": "standard deviation of the difference over seeds; empty with one",
    "documents": "documents (or items) scored",
    "resampled": "what the bootstrap draws: documents, windows of few documents, or items",
    "resampled_count": "how many of them",
    "verdict": "pays, does not, or can't tell: the interval holds 0, or seeds disagree about the sign",
    "reason": "why there is no slice to compare with",
    "oracle": "the method's blocks under oracle routing, untrained, mean over the paired seeds that have it",
    "oracle_difference": "oracle minus slice",
    "oracle_difference_low": "lower end of its interval",
    "oracle_difference_high": "upper end",
    "oracle_share_frac": "difference / oracle_difference in the oracle's seeds: the part of an untrained oracle's "
    "lead over the slice that the method reaches; empty where that lead is not clear",
    "dense_difference": "method minus dense_same_tokens: the price of sparsity",
    "dense_difference_low": "lower end of its interval",
    "dense_difference_high": "upper end",
    "dense_reason": "why there is no dense_same_tokens to compare with",
    "adaptation_tokens": "training tokens of one adapted model",
    "adaptation_wall_seconds": "wall time of all adapt stages of one record, mean over seeds",
    "adaptation_peak_rss_bytes": "largest resident memory of those stages, over seeds",
    "adaptation_time_ratio": "adapt seconds per adaptation token / those of dense_same_tokens",
    "remarks": "what else differs",
}


def pays_table(runs: LoadedRuns, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """One row per model, configuration and budget of each routed method, and measure; columns: PAYS_COLUMNS."""
    points = usable_points(runs.table)
    final = routed(deployed(points))
    bench = _Bench(runs, points)
    rows: list[dict[str, Any]] = []
    pending: list[_Pending] = []
    for _, group in final.groupby(["model", "configuration", "arm", "budget"], dropna=False, sort=False):
        of_seeds = group.sort_values("seed").to_dict("records")
        for measure in bench.measures(of_seeds):
            row, differences = bench.compare(of_seeds, measure)
            pending += [_Pending(row=row, name=name, scores=scores) for name, scores in differences.items()]
            rows.append(row)
    intervals = bootstrap_intervals([one.scores for one in pending], resamples=resamples, seed=seed)
    for one, (low, high) in zip(pending, intervals, strict=True):
        one.row.update({f"{one.name}_low": low, f"{one.name}_high": high})
    table = in_reading_order(pd.DataFrame([_judged(row) for row in rows], columns=list(PAYS_COLUMNS)))
    order = {model: index for index, model in enumerate(runs.table["model"].unique())}
    return table.sort_values("model", key=lambda models: models.map(order), kind="stable").reset_index(drop=True)


def verdict(low: float, high: float, by_seed: Sequence[float], *, lower_is_better: bool) -> str:
    """Whether a difference (method minus slice) with this interval, and these values per seed, pays.

    Open where the interval is not known, holds 0, or where a seed has the other sign.
    """
    if not (low > 0 or high < 0) or min(by_seed) * max(by_seed) <= 0:
        return OPEN
    return PAYS if (high < 0) == lower_is_better else LOSES


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """A difference whose interval is still to be computed."""

    row: dict[str, Any]
    name: str
    scores: Scores


@dataclass(kw_only=True, slots=True)
class _Pairs:
    """What stands beside a point, seed by seed."""

    seeds: list[int] = field(default_factory=list)
    own: list[Scores] = field(default_factory=list)
    other: list[Scores] = field(default_factory=list)
    reason: str = ""

    def difference(self) -> Scores:
        """Own minus other, mean over seeds."""
        share = 1 / len(self.own)
        return combine([(share, one) for one in self.own] + [(-share, one) for one in self.other])

    def by_seed(self) -> list[float]:
        """Own minus other of each seed."""
        return [own.mean - other.mean for own, other in zip(self.own, self.other, strict=True)]


_CONTROL_COLUMNS = ["identity", "model", "method", "arm", "budget", "active_ffn_frac"]
# The scores of the control beside a point, from the table's rows of the controls on its terms.
_Choose = Callable[[Mapping[Any, Any], pd.DataFrame], Scores]


class _Bench:
    """All points with their scores, and the controls among them. Scores are read when first asked for."""

    def __init__(self, runs: LoadedRuns, points: pd.DataFrame) -> None:
        self._experiments = {str(one.record["identity"]): one for one in runs.experiments}
        self._scores: dict[str, dict[ScoreKey, Scores]] = {}
        records = points.drop_duplicates("identity").to_dict("records")
        self._runs = {str(row["identity"]): self._run(row) for row in records}
        adapted = points.loc[points["arm"] == "adapted", _CONTROL_COLUMNS]
        self._slices = adapted[adapted["method"] == "static_slice"]
        self._dense = adapted[adapted["method"] == "dense_same_tokens"]

    def measures(self, of_seeds: Sequence[Mapping[Any, Any]]) -> list[str]:
        """The loss, then what of each task was kept for any of the seeds."""
        keys = [(row, key) for row in of_seeds for key in self._read(row["identity"])]
        kept = [key[2] for row, key in keys if key[:2] == point_key(row["arm"], row["budget"])]
        return list(dict.fromkeys([LOSS, *kept]))

    def compare(self, of_seeds: Sequence[Mapping[Any, Any]], measure: str) -> tuple[dict[str, Any], dict[str, Scores]]:
        """A row without its intervals, and the differences that they belong to."""
        first = of_seeds[0]
        row: dict[str, Any] = {name: first[name] for name in PAYS_COLUMNS if name in first}
        row |= {"measure": measure, "active_ffn_frac": _mean(one["active_ffn_frac"] for one in of_seeds)}
        row |= self._own(of_seeds, measure) | self._cost(of_seeds)
        differences: dict[str, Scores] = {}
        sliced, slices = self._beside_slice(of_seeds, measure)
        row["reason"] = sliced.reason
        if sliced.own:
            difference = differences["difference"] = sliced.difference()
            drawn = difference.resampled
            row |= {
                "slice": _mean(one.mean for one in sliced.other),
                "slice_from_frac": min(one.from_frac for one in slices),
                "slice_to_frac": max(one.to_frac for one in slices),
                "interpolated": any(one.interpolated for one in slices),
                "paired_seeds": len(sliced.own),
                "difference": difference.mean,
                "difference_seed_sd": _spread(sliced.by_seed()),
                "documents": len(difference.unit_U),
                "resampled": drawn.kind,
                "resampled_count": len(drawn.unit_U),
                "_by_seed": sliced.by_seed(),
            }
            oracle = self._oracle(of_seeds, sliced, measure)
            if oracle.own:
                lead = differences["oracle_difference"] = oracle.difference()
                row |= {"oracle": _mean(one.mean for one in oracle.own), "oracle_difference": lead.mean}
                there = zip(sliced.seeds, sliced.by_seed(), strict=True)
                row["_at_oracle"] = _mean(value for seed, value in there if seed in oracle.seeds)
        dense = self._beside_dense(of_seeds, measure)
        row["dense_reason"] = dense.reason
        if dense.own:
            price = differences["dense_difference"] = dense.difference()
            row["dense_difference"] = price.mean
        row["remarks"] = "; ".join(self._remarks(of_seeds, sliced))
        return row, differences

    def _own(self, of_seeds: Sequence[Mapping[Any, Any]], measure: str) -> dict[str, Any]:
        if measure == LOSS:
            values = {name: _mean(row[name] for row in of_seeds) for name in (LOSS, "perplexity")}
            return {"seeds": len(of_seeds), "value": values[LOSS], "perplexity": values["perplexity"]}
        found = [scores for row in of_seeds if (scores := self._of(row, measure)) is not None]
        value = _mean(scores.mean for scores in found)
        return {"seeds": len(found), "value": value, "perplexity": math.nan}

    def _beside_slice(self, of_seeds: Sequence[Mapping[Any, Any]], measure: str) -> tuple[_Pairs, list[Slice]]:
        slices: list[Slice] = []

        def at_width(row: Mapping[Any, Any], fitting: pd.DataFrame) -> Scores:
            widths = [
                (float(one["active_ffn_frac"]), scores)
                for one in fitting.to_dict("records")
                if (scores := self._of(one, measure)) is not None and not pd.isna(one["active_ffn_frac"])
            ]
            if not widths:
                raise NoControlError(f"static_slice has no {measure} per document or item")
            found = slice_at(float(row["active_ffn_frac"]), widths, lower_is_better=is_loss(measure))
            combine([(1.0, found.scores), (-1.0, self._needed(row, measure))])  # refuse other documents
            slices.append(found)
            return found.scores

        return self._paired(of_seeds, self._slices, "static_slice", measure, at_width), slices

    def _beside_dense(self, of_seeds: Sequence[Mapping[Any, Any]], measure: str) -> _Pairs:
        def alone(_: Mapping[Any, Any], fitting: pd.DataFrame) -> Scores:
            found = [scores for one in fitting.to_dict("records") if (scores := self._of(one, measure)) is not None]
            if not found:
                raise NoControlError(f"dense_same_tokens has no {measure} per document or item")
            return found[0]

        return self._paired(of_seeds, self._dense, "dense_same_tokens", measure, alone)

    def _paired(
        self, of_seeds: Sequence[Mapping[Any, Any]], controls: pd.DataFrame, name: str, measure: str, choose: _Choose
    ) -> _Pairs:
        """The control that `choose` takes of those on the same terms, for every seed that has one."""
        pairs, reasons = _Pairs(), []
        known = [self._runs[str(identity)] for identity in controls["identity"].unique()]
        for row in of_seeds:
            try:
                fitting = {run.identity for run in same_terms(self._runs[row["identity"]], known, name, measure)}
                other = choose(row, controls[controls["identity"].isin(fitting)])
                own = self._needed(row, measure)
                combine([(1.0, own), (-1.0, other)])
            except (NoControlError, UnlikeScoresError) as error:
                reasons.append(str(error))
                continue
            pairs.seeds.append(row["seed"])
            pairs.own.append(own)
            pairs.other.append(other)
        pairs.reason = "; ".join(dict.fromkeys(reasons))
        return pairs

    def _oracle(self, of_seeds: Sequence[Mapping[Any, Any]], sliced: _Pairs, measure: str) -> _Pairs:
        """The oracle beside the same slices, for those of the paired seeds that have it."""
        rows = {row["seed"]: row for row in of_seeds}
        found = _Pairs()
        for seed, other in zip(sliced.seeds, sliced.other, strict=True):
            scores = self._of({**rows[seed], "arm": "oracle_router"}, measure)
            if scores is None:
                continue
            try:
                combine([(1.0, scores), (-1.0, other)])
            except UnlikeScoresError:
                continue
            found.seeds.append(seed)
            found.own.append(scores)
            found.other.append(other)
        return found

    def _cost(self, of_seeds: Sequence[Mapping[Any, Any]]) -> dict[str, Any]:
        own = [AdaptCost.of(self._experiments[row["identity"]]) for row in of_seeds]
        model = of_seeds[0]["model"]
        dense = self._dense.loc[self._dense["model"] == model, "identity"]
        reference = [AdaptCost.of(self._experiments[identity]) for identity in dense]
        return {
            "adaptation_tokens": _mean(row["adaptation_tokens"] for row in of_seeds),
            "adaptation_wall_seconds": _mean(cost.wall_seconds for cost in own),
            "adaptation_peak_rss_bytes": max(cost.peak_rss_bytes for cost in own),
            "adaptation_time_ratio": seconds_per_token(own) / seconds_per_token(reference),
        }

    def _remarks(self, of_seeds: Sequence[Mapping[Any, Any]], sliced: _Pairs) -> Iterable[str]:
        if sliced.own and len(sliced.own) < len(of_seeds):
            yield f"{len(sliced.own)} of {len(of_seeds)} seeds have a slice ({sliced.reason})"
        if any(
            stage["stage"] == "prepare" for row in of_seeds for stage in stages_of(self._experiments[row["identity"]])
        ):
            yield "the adaptation tokens include those on which the dense model was changed before the cut"

    def _needed(self, row: Mapping[Any, Any], measure: str) -> Scores:
        scores = self._of(row, measure)
        if scores is None:
            raise NoControlError(f"it has no {measure} per document or item")
        return scores

    def _of(self, row: Mapping[Any, Any], measure: str) -> Scores | None:
        key: PointKey = point_key(row["arm"], row["budget"])
        return self._read(row["identity"]).get((*key, measure))

    def _read(self, identity: str) -> dict[ScoreKey, Scores]:
        if identity not in self._scores:
            self._scores[identity] = read_scores(self._experiments[identity].folder)
        return self._scores[identity]

    def _run(self, row: Mapping[Any, Any]) -> Run:
        tokens = row["adaptation_tokens"]
        return Run(
            identity=str(row["identity"]),
            model=str(row["model"]),
            seed=int(row["seed"]),
            tokens=None if pd.isna(tokens) else int(tokens),
            protocol=self._experiments[str(row["identity"])].record["protocol"],
        )


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with its verdict, and the oracle's share where the oracle's lead is clear."""
    lower_is_better = is_loss(row["measure"])
    if "difference" in row:
        ends = row["difference_low"], row["difference_high"]
        row["verdict"] = verdict(*ends, row["_by_seed"], lower_is_better=lower_is_better)
    ends = row.get("oracle_difference_low", math.nan), row.get("oracle_difference_high", math.nan)
    if ends[1] < 0 if lower_is_better else ends[0] > 0:
        row["oracle_share_frac"] = row["_at_oracle"] / row["oracle_difference"]
    return row


def _mean(values: Iterable[Any]) -> float:
    known = [float(value) for value in values if not pd.isna(value)]
    return sum(known) / len(known) if known else math.nan


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
