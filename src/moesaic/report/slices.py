"""The control that a routed point is held against: which records may stand beside it, and the slice at its width.

A control counts only where backbone, data, protocol, seed and adaptation tokens are the same; else the reason is kept.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.report.format import percent
from moesaic.report.paired import Scores, combine
from moesaic.report.scores import LOSS

__all__ = ["NoControlError", "Run", "Slice", "same_terms", "slice_at"]

_SAME_WIDTH = 0.001  # a fraction of the dense FFN within which two active shares are one
_SAME_TOKENS = 0.01
# How many sequences went through the model at once cannot change what was measured.
_NOT_PROTOCOL = frozenset({"batch_size"})


class NoControlError(ValueError):
    """Nothing equal stands beside a point; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What has to be equal between two experiments before their points are compared."""

    identity: str
    model: str
    seed: int
    tokens: int | None  # of adaptation
    protocol: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """The static slice at an active share: measured there (`from_frac` = `to_frac`), or between two measured widths."""

    scores: Scores
    from_frac: float
    to_frac: float

    @property
    def interpolated(self) -> bool:
        """Whether no slice was measured at this share."""
        return self.from_frac != self.to_frac


def same_terms(run: Run, controls: Sequence[Run], name: str, measure: str) -> list[Run]:
    """Those of `controls`, called `name`, that were measured and adapted as `run` was.

    NoControlError names the first thing that differs.
    """
    left = list(controls)
    checks: tuple[tuple[Callable[[Run], bool], Callable[[list[Run]], str]], ...] = (
        (lambda one: one.model == run.model, lambda _: f"no {name} was run on {run.model}"),
        (
            lambda one: _protocol(one, measure) == _protocol(run, measure),
            lambda others: f"{name} was measured under another protocol ({_differing(run, others[0], measure)})",
        ),
        (lambda one: one.seed == run.seed, lambda _: f"no {name} was run with seed {run.seed}"),
        (
            lambda one: _same_tokens(one.tokens, run.tokens),
            lambda others: f"{name} was adapted on {_counts(others)} tokens, this on {_count(run.tokens)}",
        ),
    )
    for fits, reason in checks:
        kept = [one for one in left if fits(one)]
        if not kept:
            raise NoControlError(reason(left))
        left = kept
    return left


def slice_at(share: float, widths: Sequence[tuple[float, Scores]], *, lower_is_better: bool) -> Slice:
    """The slice at active share `share` from slices of the `widths` measured.

    Between two widths, each unit's score is interpolated linearly. Of several slices of one width the best counts.
    NoControlError outside the measured range; UnlikeScoresError where the slices were scored on different units.
    """
    sign = 1.0 if lower_is_better else -1.0
    same = [(width, scores) for width, scores in widths if abs(width - share) <= _SAME_WIDTH]
    if same:
        return Slice(scores=min(same, key=lambda one: sign * one[1].mean)[1], from_frac=share, to_frac=share)
    below, above = [one for one in widths if one[0] < share], [one for one in widths if one[0] > share]
    if not (below and above):
        measured = ", ".join(percent(width) for width in sorted({width for width, _ in widths}))
        raise NoControlError(f"its active share {percent(share)} lies outside the slices' ({measured})")
    low, low_scores = max(below, key=lambda one: (one[0], -sign * one[1].mean))
    high, high_scores = min(above, key=lambda one: (one[0], sign * one[1].mean))
    part = (share - low) / (high - low)
    return Slice(scores=combine([(1 - part, low_scores), (part, high_scores)]), from_frac=low, to_frac=high)


def _protocol(run: Run, measure: str) -> dict[str, str]:
    if measure == LOSS:
        part = run.protocol.get("perplexity")
    else:
        tasks = run.protocol.get("tasks")
        part = tasks.get(measure.rsplit(".", 1)[0]) if isinstance(tasks, Mapping) else None
    named = part if isinstance(part, Mapping) else {"": part}
    return {str(key): str(value) for key, value in named.items() if key not in _NOT_PROTOCOL}


def _differing(run: Run, other: Run, measure: str) -> str:
    own, theirs = _protocol(run, measure), _protocol(other, measure)
    key = next(key for key in {**own, **theirs} if own.get(key) != theirs.get(key))
    there, here = (textwrap.shorten(str(part.get(key)), 40, placeholder="...") for part in (theirs, own))
    return f"{key}: {there}, here {here}"


def _same_tokens(one: int | None, other: int | None) -> bool:
    return one == other or (
        one is not None and other is not None and abs(one - other) <= _SAME_TOKENS * max(one, other)
    )


def _counts(runs: Sequence[Run]) -> str:
    return " or ".join(dict.fromkeys(_count(run.tokens) for run in runs))


def _count(tokens: int | None) -> str:
    return "unknown" if tokens is None else f"{tokens:,}"
