"""Timing samples: taken in turns, summarised robustly, compared as pairs.

Arms are timed A B A B ..., so that what disturbs the machine disturbs all of them; the i-th samples of two arms are a
pair of neighbours in time, and a ratio is a statement about pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["MIN_ROUNDS", "Arm", "Ratio", "Times", "interleave", "paired_ratio"]

MIN_ROUNDS = 5  # below this a percentile means nothing, however slow the call is
RESAMPLES = 2000

Clock = Callable[[], float]
Arm = Callable[[], Callable[[], object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Median and 10th to 90th percentile of `n` samples, in milliseconds."""

    median: float
    p10: float
    p90: float
    n: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Times:
        """The summary of `samples_ms`, at least one."""
        p10, median, p90 = np.percentile(samples_ms, [10, 50, 90]).tolist()
        return cls(median=median, p10=p10, p90=p90, n=len(samples_ms))

    def plain(self) -> dict[str, Any]:
        """As it stands in a record."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Median of the pairs' ratios own / dense, with a 95 % bootstrap interval over the pairs."""

    median: float
    low: float
    high: float


def interleave(
    arms: Mapping[str, Arm],
    *,
    rounds: int,
    warm_up: int = 1,
    max_seconds: float = float("inf"),
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per arm and round: A B C, A B C, ..., after `warm_up` rounds whose times are thrown away.

    An arm is called outside the clock to set the scene and returns the call that is timed. Rounds stop early, always
    after a whole one and never before `MIN_ROUNDS` (or `rounds`, if fewer), once `max_seconds` have passed.
    """
    samples: dict[str, list[float]] = {name: [] for name in arms}
    begin = clock()
    for number in range(warm_up + rounds):
        done = number - warm_up
        if done >= MIN_ROUNDS and clock() - begin > max_seconds:
            break
        for name, prepare in arms.items():
            call = prepare()
            start = clock()
            call()
            elapsed = clock() - start
            if done >= 0:
                samples[name].append(elapsed)
    return samples


def paired_ratio(own: Sequence[float], dense: Sequence[float], *, seed: int = 0) -> Ratio:
    """Ratio of two arms of one `interleave`. The interval is over timing pairs, not over seeds or items."""
    assert len(own) == len(dense) > 0
    pairs = np.asarray(own) / np.asarray(dense)
    drawn = np.random.default_rng(seed).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    low, high = np.percentile(np.median(pairs[drawn], axis=1), [2.5, 97.5]).tolist()
    median = float(np.median(pairs))
    # Interpolation between few values can end a hair beside the median.
    return Ratio(median=median, low=min(low, median), high=max(high, median))
