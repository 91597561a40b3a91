"""Order and arithmetic of timing, on a fake clock."""

import math
from collections.abc import Callable

import pytest

from moesaic.bench.samples import MIN_ROUNDS, Times, interleave, paired_ratio


class FakeClock:
    """A clock that only moves when an arm works."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def __call__(self) -> float:
        return self.now

    def arm(self, name: str, seconds: float, *, preparing: float = 0.0) -> Callable[[], Callable[[], None]]:
        def work() -> None:
            self.now += seconds
            self.log.append(name)

        def prepare() -> Callable[[], None]:
            self.now += preparing
            return work

        return prepare


def test_arms_take_turns_and_warm_up_is_not_counted() -> None:
    clock = FakeClock()
    arms = {"dense": clock.arm("A", 2.0), "own": clock.arm("B", 1.0), "control": clock.arm("C", 4.0)}
    samples = interleave(arms, rounds=3, warm_up=2, clock=clock)
    assert "".join(clock.log) == "ABC" * 5
    assert samples == {"dense": [2.0] * 3, "own": [1.0] * 3, "control": [4.0] * 3}


def test_preparing_is_outside_the_clock() -> None:
    clock = FakeClock()
    samples = interleave({"dense": clock.arm("A", 2.0, preparing=50.0)}, rounds=2, clock=clock)
    assert samples == {"dense": [2.0, 2.0]}


@pytest.mark.parametrize(("max_seconds", "rounds"), [(0.0, MIN_ROUNDS), (24.0, 8), (1e9, 20)])
def test_the_time_limit_ends_after_a_whole_round(max_seconds: float, rounds: int) -> None:
    clock = FakeClock()
    arms = {"dense": clock.arm("A", 2.0), "own": clock.arm("B", 1.0)}
    samples = interleave(arms, rounds=20, warm_up=1, max_seconds=max_seconds, clock=clock)
    assert [len(values) for values in samples.values()] == [rounds, rounds]


def test_ratio_is_of_pairs_so_that_drift_cancels() -> None:
    dense = [float(2**i) for i in range(9)]  # the machine gets slower and slower
    ratio = paired_ratio([0.25 * seconds for seconds in dense], dense)
    assert (ratio.median, ratio.low, ratio.high) == (0.25, 0.25, 0.25)


def test_ratio_interval_holds_the_median_and_narrows_with_samples() -> None:
    pairs = [0.5 + 0.01 * (i % 7) for i in range(14)]
    few = paired_ratio(pairs, [1.0] * 14)
    many = paired_ratio(pairs * 20, [1.0] * 280)
    assert few.low <= few.median <= few.high
    assert few.median == pytest.approx(0.53)
    assert many.high - many.low < few.high - few.low
    assert paired_ratio(pairs, [1.0] * 14) == few


def test_times_by_hand() -> None:
    times = Times.of([float(i) for i in range(11)])
    assert times.plain() == {"median": 5.0, "p10": 1.0, "p90": 9.0, "n": 11}
    assert not math.isnan(Times.of([3.0]).p10)
