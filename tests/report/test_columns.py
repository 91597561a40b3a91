import pytest

from moesaic.report.columns import COLUMNS, find_quality, qualities, task_column


@pytest.mark.parametrize(
    ("metric", "column"),
    [
        ("acc", "task.t.acc_frac"),
        ("acc,none", "task.t.acc_frac"),
        ("acc_pmi", "task.t.acc_pmi_frac"),
        ("gold_nll", "task.t.gold_nll_nats"),
        ("kl_to_dense", "task.t.kl_to_dense_nats"),
        ("items", "task.t.items"),
    ],
)
def test_task_columns_say_their_unit(metric: str, column: str) -> None:
    assert task_column("t", metric) == column


def test_every_column_is_documented_once() -> None:
    names = [column.name for column in COLUMNS]
    assert len(names) == len(set(names))
    assert all(column.meaning for column in COLUMNS)


def test_qualities_know_which_way_is_better() -> None:
    columns = ["seed", "perplexity", "task.blimp.acc_frac", "task.blimp.items", "task.my.task.gold_nll_nats"]
    found = {quality.name: quality.maximise for quality in qualities(columns)}
    assert found == {"perplexity": False, "blimp.acc": True, "my.task.gold_nll": False}


def test_unknown_quality_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'perplexty'; did you mean 'perplexity'\? These records have: perplexity"):
        find_quality("perplexty", ["perplexity"])
