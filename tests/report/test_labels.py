from pathlib import Path

from report.synthetic_records import point, record, write_record

from moesaic.report.labels import machine_name
from moesaic.report.load import load


def _labels(root: Path) -> list[str]:
    return sorted(load(root).table["label"].unique())


def _write(root: Path, *, backbone: str = "synthetic-a", budget: float = 8, **config: object) -> None:
    write_record(root, record("m", backbone, 0, [point("adapted", budget, 2.0, active=0.25)], **config))


def test_budgets_trained_apart_are_one_curve(tmp_path: Path) -> None:
    for budget in (8, 16):
        _write(tmp_path, budget=budget, select={"k": budget}, budgets=[budget])
    assert _labels(tmp_path) == ["m"]


def test_a_component_is_named_by_its_kind_not_by_all_its_fields(tmp_path: Path) -> None:
    _write(tmp_path, partition={"_target_": "moesaic.sparse.partition.Random", "num_blocks": 4})
    _write(tmp_path, partition={"_target_": "moesaic.sparse.partition.BalancedKMeans", "num_blocks": 4, "rows": "up"})
    assert _labels(tmp_path) == ["m (partition=BalancedKMeans)", "m (partition=Random)"]


def test_what_cannot_be_told_in_words_gets_a_hash(tmp_path: Path) -> None:
    for value in (1, 2):
        _write(tmp_path, a=value, b=value, c=value, d=value)
    labels = _labels(tmp_path)
    assert len(labels) == 2
    assert all(label.startswith("m #") for label in labels)


def test_other_backbones_do_not_lengthen_a_label(tmp_path: Path) -> None:
    _write(tmp_path, width=1)
    _write(tmp_path, width=2, backbone="synthetic-b")
    assert _labels(tmp_path) == ["m"]
    assert set(load(tmp_path).table["setting"]) == {"synthetic-a", "synthetic-b"}


def test_settings_name_the_machine_only_where_there_are_several(tmp_path: Path) -> None:
    _write(tmp_path)
    other = record("m", "synthetic-a", 1, [point("adapted", 8, 2.0, active=0.25)])
    other["environment"] = {"device_name": "Synthetic GPU"}
    write_record(tmp_path, other)
    assert set(load(tmp_path).table["setting"]) == {
        "synthetic-a, Synthetic CPU, 2 threads, float32",
        "synthetic-a, Synthetic GPU, float32",
    }


def test_machine_name() -> None:
    environment = {"device_name": "X", "device": "cpu", "threads": 4}
    quality = {"perplexity": {"dtype": "float32"}}
    assert machine_name(environment, {}, quality) == "X, 4 threads, float32"
    asked = {"bench": {"threads": 1, "dtype": "bfloat16"}}
    assert machine_name(environment, asked, quality) == "X, 1 threads, bfloat16"
    assert machine_name({}, {}, {}) == "unknown machine"
