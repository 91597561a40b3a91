"""Item measures against cases counted by hand."""

import math

import pytest

from moesaic.evaluate.items import Item, gold_nll, items_from_rows, kl_to_dense, margin, option_logprobs, summarise


def item(name: str, gold: int, *loglik: float, baseline: tuple[float, ...] | None = None) -> Item:
    return Item(id=name, gold=gold, option_loglik=loglik, baseline_loglik=baseline)


def logs(*probabilities: float) -> tuple[float, ...]:
    return tuple(math.log(p) for p in probabilities)


def test_option_logprobs_sum_to_one_even_far_from_zero() -> None:
    shifted = option_logprobs([-1000.0, -1000.0 + math.log(3)])
    assert [math.exp(value) for value in shifted] == pytest.approx([0.25, 0.75])


def test_gold_nll_ignores_what_options_share() -> None:
    assert gold_nll([-5.0] * 4, gold=2) == pytest.approx(math.log(4))
    assert gold_nll([value - 7 for value in logs(0.1, 0.9)], gold=0) == pytest.approx(-math.log(0.1))


def test_margin_is_against_the_best_wrong_option() -> None:
    assert margin([-1.0, -3.0, -2.0], gold=0) == 1.0
    assert margin([-1.0, -3.0, -2.0], gold=1) == -2.0


def test_kl_by_hand_and_zero_on_itself() -> None:
    dense, own = logs(0.5, 0.5), logs(0.25, 0.75)
    assert kl_to_dense(own, dense) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert kl_to_dense(own, own) == pytest.approx(0.0)


def test_summary_of_two_items() -> None:
    items = [item("a", 0, *logs(0.6, 0.4)), item("b", 1, *logs(0.7, 0.3))]
    dense = [item("b", 1, *logs(0.2, 0.8)), item("a", 0, *logs(0.6, 0.4))]
    summary = summarise(items, dense)
    assert summary["acc"] == 0.5
    assert summary["items"] == 2
    assert summary["agreement"] == 0.5
    assert summary["gold_nll"] == pytest.approx(-(math.log(0.6) + math.log(0.3)) / 2)
    assert summary["kl_to_dense"] == pytest.approx(kl_to_dense(logs(0.7, 0.3), logs(0.2, 0.8)) / 2)
    assert "acc_pmi" not in summary


def test_pmi_removes_a_likely_but_wrong_option() -> None:
    # Option 1 is likely anywhere; only option 0 becomes likelier by the context.
    answered = item("a", 0, -4.0, -3.0, baseline=(-9.0, -3.0))
    assert summarise([answered]) | {"items": 1} == {
        "acc": 0.0,
        "acc_pmi": 1.0,
        "gold_nll": pytest.approx(math.log(1 + math.e)),
        "margin": -1.0,
        "items": 1,
    }


@pytest.mark.parametrize(
    ("dense", "words"),
    [
        ([], "not answered"),
        ([item("a", 1, -1.0, -2.0)], "another question"),
        ([item("a", 0, -1.0)], "another question"),
    ],
)
def test_unpaired_items_are_refused(dense: list[Item], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        summarise([item("a", 0, -1.0, -2.0)], dense)


def test_no_items_are_refused() -> None:
    with pytest.raises(ValueError, match="no items"):
        summarise([])


def test_rows_round_trip() -> None:
    items = (item("a", 0, -1.0, -2.0), item("b", 1, -1.0, -2.0, baseline=(-3.0, -4.0)))
    assert items_from_rows([each.row() | {"task": "other columns stay out"} for each in items]) == items
