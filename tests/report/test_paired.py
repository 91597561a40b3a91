"""Paired bootstrap against a loop, against the closed form of a mean's standard error, and by its coverage."""

import numpy as np
import pytest
from report.toy_scores import scores

from moesaic.report.paired import Scores, UnlikeScoresError, bootstrap_intervals, combine


def test_a_mean_is_over_the_weights() -> None:
    assert scores([3.0, 1.0], [1, 3]).mean == pytest.approx(4 / 4)


def test_combining_is_unit_by_unit() -> None:
    a, b = scores([1.0, 2.0], [1, 2]), scores([5.0, 4.0], [1, 2])
    assert list(combine([(0.75, a), (0.25, b)]).sum_U) == [2.0, 2.5]
    assert combine([(1.0, a), (-1.0, b)]).mean == pytest.approx((-4 - 2) / 3)


def test_finer_scores_are_combined_where_all_have_them() -> None:
    a = scores([3.0], finer=scores([1.0, 2.0]))
    b = scores([7.0], finer=scores([3.0, 4.0]))
    finer = combine([(1.0, a), (-1.0, b)]).finer
    assert finer is not None
    assert list(finer.sum_U) == [-2.0, -2.0]
    assert combine([(1.0, a), (-1.0, scores([7.0]))]).finer is None


@pytest.mark.parametrize("other", [scores([1.0, 2.0], first=1), scores([1.0, 2.0], [1, 2]), scores([1.0])])
def test_what_was_scored_on_other_documents_is_refused(other: Scores) -> None:
    with pytest.raises(UnlikeScoresError, match="scored on other documents"):
        combine([(1.0, scores([1.0, 2.0])), (-1.0, other)])


def test_intervals_equal_a_loop_over_resamples() -> None:
    generator = np.random.default_rng(5)
    one, two = (scores(generator.normal(size=11), range(1, 12)) for _ in range(2))
    found = bootstrap_intervals([one, two], resamples=130, seed=3)
    picks, means = np.random.default_rng(3), [[], []]
    for count in (64, 64, 2):  # resamples are drawn in chunks
        for drawn in picks.integers(0, 11, size=(count, 11)):
            for each, of in zip((one, two), means, strict=True):
                of.append(sum(each.sum_U[i] for i in drawn) / sum(each.weight_U[i] for i in drawn))
    for (low, high), of in zip(found, means, strict=True):
        assert (low, high) == pytest.approx((np.quantile(of, 0.025), np.quantile(of, 0.975)))


def test_the_width_is_that_of_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    ((low, high),) = bootstrap_intervals([scores(values)], resamples=8000)
    standard_error = values.std() / 20
    assert (high - low) / (2 * 1.96 * standard_error) == pytest.approx(1.0, abs=0.03)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * standard_error)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    samples = [scores(generator.normal(0.3, 1.0, 60)) for _ in range(400)]
    hits = sum(low <= 0.3 <= high for low, high in bootstrap_intervals(samples, resamples=600))
    # 95 % less what a percentile bootstrap of 60 units lacks; 3 standard errors of 400 trials either way
    assert 0.90 <= hits / 400 <= 0.98


def test_pairing_takes_away_what_both_share() -> None:
    hard = np.random.default_rng(2).normal(3.0, 1.0, 50)
    easier = hard - 0.01 * np.arange(1, 51) / 50
    ((low, high),) = bootstrap_intervals([combine([(1.0, scores(easier)), (-1.0, scores(hard))])])
    assert -0.01 < low < high < 0.0


def test_few_documents_are_resampled_by_their_windows() -> None:
    windows = scores(np.random.default_rng(3).normal(size=40))
    few = scores(windows.sum_U.reshape(4, 10).sum(1), [10] * 4, finer=windows)
    many = scores(np.arange(8.0), finer=windows)
    assert few.resampled is windows
    assert many.resampled is many
    assert bootstrap_intervals([few]) == bootstrap_intervals([windows])


def test_one_unit_has_no_interval() -> None:
    assert np.isnan(bootstrap_intervals([scores([1.0])])).all()
    assert bootstrap_intervals([]) == []
