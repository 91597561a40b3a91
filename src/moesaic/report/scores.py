"""What one experiment scored, document by document and item by item, ready to be paired with another's.

A file that is missing or cannot be read gives no scores; the comparison that needs them says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moesaic.report.paired import Scores
from moesaic.runs.record import DOCUMENTS_FILE, ITEMS_FILE

__all__ = ["LOSS", "PointKey", "ScoreKey", "is_loss", "point_key", "read_scores"]

LOSS = "nats_per_token"
PointKey = tuple[str, float | None]  # arm, budget
ScoreKey = tuple[str, float | None, str]  # arm, budget, measure: LOSS, "<task>.acc" or "<task>.margin"


def is_loss(measure: str) -> bool:
    """Whether less is better."""
    return measure == LOSS


def point_key(arm: object, budget: object) -> PointKey:
    """Arm and budget as a key; whatever pandas calls missing is None."""
    return str(arm), None if pd.isna(budget) else float(budget)  # type: ignore[call-overload, arg-type]


def read_scores(folder: Path) -> dict[ScoreKey, Scores]:
    """All scores in the record's folder, by arm, budget and measure."""
    return {**_tolerant(folder / DOCUMENTS_FILE, _losses), **_tolerant(folder / ITEMS_FILE, _answers)}


_Reader = Callable[[pd.DataFrame], Iterable[tuple[ScoreKey, Scores]]]


def _tolerant(path: Path, read: _Reader) -> dict[ScoreKey, Scores]:
    try:
        return dict(read(pd.read_parquet(path)))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def _losses(frame: pd.DataFrame) -> Iterator[tuple[ScoreKey, Scores]]:
    for key, rows in _points(frame):
        ordered, unit_U = _in_order(rows, "document")
        yield (
            (*key, LOSS),
            Scores(
                kind="documents",
                unit_U=unit_U,
                sum_U=ordered["nll"].to_numpy(dtype=float),
                weight_U=ordered["tokens"].to_numpy(dtype=float),
                finer=_windows(ordered),
            ),
        )


def _windows(ordered: pd.DataFrame) -> Scores | None:
    """The same losses per window; None in files that hold none."""
    if "window_nll" not in ordered or ordered["window_nll"].isna().any():
        return None
    counts = ordered["window_nll"].map(len).to_numpy()
    document = np.repeat(np.arange(len(ordered)), counts)
    return Scores(
        kind="windows",
        unit_U=pd.MultiIndex.from_arrays([document, np.concatenate([np.arange(count) for count in counts])]),
        sum_U=np.concatenate(ordered["window_nll"].to_list()).astype(float),
        weight_U=np.concatenate(ordered["window_tokens"].to_list()).astype(float),
    )


def _answers(frame: pd.DataFrame) -> Iterator[tuple[ScoreKey, Scores]]:
    for key, rows in _points(frame):
        for task, answers in rows.groupby("task", sort=False):
            ordered, unit_U = _in_order(answers, "id")
            correct_U, margin_U = _correct_and_margin(ordered["option_loglik"], ordered["gold"].to_numpy(dtype=int))
            ones_U = np.ones(len(ordered))
            for name, sum_U in (("acc", correct_U), ("margin", margin_U)):
                yield (*key, f"{task}.{name}"), Scores(kind="items", unit_U=unit_U, sum_U=sum_U, weight_U=ones_U)


def _correct_and_margin(
    loglik: Iterable[NDArray[np.float64]], gold_U: NDArray[np.int_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """1 where an item's right option is likeliest (the first of equals), and its lead over the best wrong one."""
    options = [np.asarray(values, dtype=float) for values in loglik]
    widest = max(map(len, options))
    loglik_UO = np.full((len(options), widest), -np.inf)
    for row, values in zip(loglik_UO, options, strict=True):
        row[: len(values)] = values
    item_U = np.arange(len(options))
    gold_loglik_U = loglik_UO[item_U, gold_U]
    correct_U = (loglik_UO.argmax(axis=1) == gold_U).astype(float)
    loglik_UO[item_U, gold_U] = -np.inf
    return correct_U, gold_loglik_U - loglik_UO.max(axis=1)


def _points(frame: pd.DataFrame) -> Iterator[tuple[PointKey, pd.DataFrame]]:
    known = frame if "budget" in frame else frame.assign(budget=None)
    for (arm, budget), rows in known.groupby(["arm", "budget"], dropna=False, sort=False):
        yield point_key(arm, budget), rows


def _in_order(rows: pd.DataFrame, name: str) -> tuple[pd.DataFrame, pd.Index]:
    """Rows by `name`, and an index that also tells apart what is called the same."""
    repeat = rows.groupby(name).cumcount()
    ordered = rows.assign(_repeat=repeat).sort_values([name, "_repeat"], kind="stable")
    return ordered, pd.MultiIndex.from_frame(ordered[[name, "_repeat"]])
