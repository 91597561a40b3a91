"""Numbers as people read them, the same in the terminal, in pictures and in the page."""

from __future__ import annotations

import math

__all__ = ["MISSING", "budget", "difference", "interval", "percent", "quality", "ratio", "significant"]

MISSING = "—"


def significant(value: object, digits: int = 4) -> str:
    """`value` with so many significant digits and no exponent below a million; a dash where there is none."""
    number = _number(value)
    if number is None:
        return MISSING
    if not math.isfinite(number):
        return "∞" if number > 0 else "-∞"
    if abs(number) >= 1e6:
        return f"{number:.2e}"
    whole = len(str(int(abs(number))))
    return f"{number:,.{max(0, digits - whole)}f}"


def percent(frac: object, digits: int = 1) -> str:
    """A fraction as percent: "25 %", "12.5 %"."""
    number = _number(frac)
    if number is None:
        return MISSING
    text = f"{100 * number:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def quality(value: object, column: str) -> str:
    """A quality as it is usually written: fractions as percent, losses and perplexities with four digits."""
    return percent(value) if column.endswith("_frac") else significant(value)


def difference(value: object, *, points: bool = False) -> str:
    """A signed difference with four digits after the point; one of fractions as percentage `points`, "+1.2"."""
    number = _number(value)
    if number is None:
        return MISSING
    return (f"{100 * number:+.1f}" if points else f"{number:+.4f}").replace("-", "−")


def ratio(value: object) -> str:
    """A ratio of times with two digits; a dash where there is none."""
    number = _number(value)
    return MISSING if number is None else f"{number:.2f}"


def interval(low: object, high: object) -> str:
    """The ends of an interval of a ratio, "0.61–0.64"; empty where there is none."""
    ends = _number(low), _number(high)
    return "" if None in ends else f"{ends[0]:.2f}–{ends[1]:.2f}"


def budget(knob: object, value: object) -> str:
    """An inference budget as "k=8"; a dash for a model without one."""
    number = _number(value)
    if number is None:
        return MISSING
    return f"{knob}={number:g}" if isinstance(knob, str) and knob else f"{number:g}"


def _number(value: object) -> float | None:
    """None for whatever pandas calls missing: None, NaN, NA."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number
