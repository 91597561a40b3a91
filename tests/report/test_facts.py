from pathlib import Path

from report.synthetic_records import point, record, write_record, write_runs

from moesaic.report.facts import shared_facts, stage_costs
from moesaic.report.load import load


def test_a_shared_stage_is_counted_once(tmp_path: Path) -> None:
    costs = stage_costs(load(write_runs(tmp_path, seeds=(0, 1))).experiments).set_index("stage")
    assert costs.loc["backbone"].to_dict() == {
        "stages": 1, "wall_seconds": 90.0, "cpu_seconds": 170.0, "peak_rss_bytes": 1_500_000_000,
    }  # fmt: skip
    assert (costs.loc["adapt", "stages"], costs.loc["adapt", "wall_seconds"]) == (10, 200.0)


def test_differences_between_records_are_all_shown(tmp_path: Path) -> None:
    for seed, threads in enumerate((2, 4, 2)):
        one = record("m", "synthetic-a", seed, [point("adapted", 8, 2.0, active=0.25)])
        one["environment"] = {"cpu_model": "Synthetic CPU", "blas": {"threads": threads}}
        write_record(tmp_path, one)
    facts = dict(shared_facts(load(tmp_path).experiments, "environment"))
    assert facts["cpu_model"] == ["Synthetic CPU"]
    assert sorted(facts["blas.threads"]) == ["2", "4"]
