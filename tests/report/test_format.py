import pytest

from moesaic.report import format as fmt


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.3891, "7.389"), (123.456, "123.5"), (0.0123, "0.012"), (12345.6, "12,346"), (3e7, "3.00e+07"), (None, "—"),
     (float("nan"), "—"), (float("inf"), "∞")],
)  # fmt: skip
def test_significant(value: object, text: str) -> None:
    assert fmt.significant(value) == text


def test_fractions_become_percent() -> None:
    assert (fmt.percent(0.25), fmt.percent(0.125), fmt.percent(0.03125, 0), fmt.percent(1.0)) == (
        "25 %", "12.5 %", "3 %", "100 %",
    )  # fmt: skip


def test_interval_and_budget() -> None:
    assert fmt.interval(0.612, 0.638) == "0.61–0.64"
    assert fmt.interval(None, 0.638) == ""
    assert (fmt.budget("tau", 0.1), fmt.budget("k", 8.0), fmt.budget(None, 3), fmt.budget("k", None)) == (
        "tau=0.1", "k=8", "3", "—",
    )  # fmt: skip


def test_a_difference_has_a_sign() -> None:
    assert (fmt.difference(0.01234), fmt.difference(-0.5), fmt.difference(None)) == ("+0.0123", "−0.5000", "—")
    assert (fmt.difference(-0.0312, points=True), fmt.difference(0.4, points=True)) == ("−3.1", "+40.0")
