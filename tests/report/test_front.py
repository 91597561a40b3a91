from pathlib import Path

import numpy as np
import pytest
from report.synthetic_records import cell, point, record, write_record, write_runs

from moesaic.report.columns import find_quality
from moesaic.report.front import ReferencePoint, cell_label, fronts, hypervolume, hypervolumes, membership, nondominated
from moesaic.report.load import load


def _dominated(points: np.ndarray, index: int, sign: float) -> bool:
    mine = points[index] * (sign, 1)
    return any((other * (sign, 1) <= mine).all() and (other * (sign, 1) < mine).any() for other in points)


@pytest.mark.parametrize("maximise", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_nondominated_against_every_pair(seed: int, maximise: bool) -> None:
    # A coarse grid, so that ties in one coordinate and whole duplicates occur.
    points = np.random.default_rng(seed).integers(0, 6, size=(40, 2)).astype(float)
    expected = [not _dominated(points, i, -1.0 if maximise else 1.0) for i in range(len(points))]
    assert nondominated(points, maximise_quality=maximise).tolist() == expected


def test_duplicates_are_all_kept() -> None:
    assert nondominated([[1, 1], [1, 1], [2, 2]], maximise_quality=False).tolist() == [True, True, False]
    assert nondominated(np.zeros((0, 2)), maximise_quality=False).tolist() == []


def test_hypervolume_of_two_steps_by_hand() -> None:
    # boxes up to (2, 1.25): (2-1)(1.25-1) + (1.25-... second step): 1 x 0.25 + 0.5 x 0.5
    reference = ReferencePoint(2.0, 1.25)
    assert hypervolume([[1.0, 1.0], [1.5, 0.5]], reference) == pytest.approx(1 * 0.25 + 0.5 * 0.5)
    assert hypervolume([[3.0, 0.1], [1.0, 2.0]], reference) == 0.0
    with pytest.raises(ValueError, match="both must be above 0"):
        ReferencePoint(0.0, 1.0)


def test_membership_by_enumeration() -> None:
    # Candidate 1 beats candidate 0 in ratio for one of its two seeds and loses for the other: means of two draws are
    # 0.4 (1/4), 0.5 (1/2), 0.6 (1/4), against 0.55, at equal quality. So 1 is on the front in 3/4, 0 in 1/4.
    seeds = [np.array([[2.0, 0.55]]), np.array([[2.0, 0.4], [2.0, 0.6]])]
    share = membership(seeds, maximise_quality=False, resamples=4000, generator=np.random.default_rng(0))
    assert share == pytest.approx([0.25, 0.75], abs=0.03)


def test_membership_needs_two_seeds() -> None:
    only = membership(
        [np.array([[1.0, 1.0]])], maximise_quality=False, resamples=10, generator=np.random.default_rng(0)
    )
    assert np.isnan(only).all()


def _write(root: Path, method: str, nats: float, ratio: float | None, *, budget: float | None = 8) -> None:
    speed = [] if ratio is None else [cell("prefill", 1, 512, 0, ratio=ratio, ideal=0.4)]
    arm = "dense" if method == "dense" else "adapted"
    write_record(root, record(method, "synthetic-a", 0, [point(arm, budget, nats, active=0.5, speed=speed)]))


def test_front_of_known_points(tmp_path: Path) -> None:
    _write(tmp_path, "dense", 2.0, 0.9, budget=None)  # its own timing noise must not move it
    _write(tmp_path, "good", 2.1, 0.6)
    _write(tmp_path, "worse", 2.2, 0.7)
    _write(tmp_path, "slow", 2.05, 1.1)
    _write(tmp_path, "untimed", 1.0, None)
    table = load(tmp_path).table
    quality = find_quality("perplexity", table.columns)
    candidates = fronts(table, quality)
    found = dict(zip(candidates["label"], candidates["on_front"], strict=True))
    assert found == {"dense": True, "good": True, "worse": False, "slow": False}
    assert candidates.set_index("label").loc["dense", "ratio"] == 1.0
    (volume,) = hypervolumes(candidates, quality, ReferencePoint(2.0, 1.25)).to_dict("records")
    good = np.exp(2.1) / np.exp(2.0)
    assert volume["hypervolume"] == pytest.approx((2 - 1) * 0.25 + (2 - good) * (1 - 0.6))
    assert volume["dense_hypervolume"] == pytest.approx(0.25)


def test_accuracy_is_maximised_and_normalised_the_other_way(tmp_path: Path) -> None:
    _write(tmp_path, "dense", 2.0, None, budget=None)  # accuracy 0.8 by the synthetic rule
    _write(tmp_path, "good", 2.4, 0.5)  # 0.7
    table = load(tmp_path).table
    quality = find_quality("next_line.acc", table.columns)
    candidates = fronts(table, quality)
    assert candidates["on_front"].all()
    (volume,) = hypervolumes(candidates, quality, ReferencePoint(2.0, 1.25)).to_dict("records")
    assert volume["hypervolume"] == pytest.approx(1 * 0.25 + (2 - 0.8 / 0.7) * 0.5)


def test_one_front_per_model_phase_and_batch_with_dense_on_each(tmp_path: Path) -> None:
    table = load(write_runs(tmp_path, seeds=(0, 1), backbones=("synthetic-a", "synthetic-b"))).table
    candidates = fronts(table, find_quality("perplexity", table.columns), resamples=20)
    groups = candidates.groupby(["setting", "phase", "batch_size"])
    assert len(groups) == 2 * 4
    assert (groups["method"].apply(lambda names: (names == "dense").sum()) == 1).all()
    assert candidates["membership_frac"].between(0, 1).all()
    assert set(candidates["arm"]) == {"dense", "adapted"}


def test_cell_labels() -> None:
    assert cell_label("prefill", 1, 512, None) == "prefill, batch 1, 512 tokens"
    assert cell_label("decode", 8, 32, 128) == "decode, batch 8, after 128 tokens"
