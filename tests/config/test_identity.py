"""identity: equal exactly when the configurations mean the same."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest

from moesaic.config.identity import identity
from moesaic.config.strict import strict_object


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    lr: float
    log_every_steps: int = field(default=10, metadata={"identity": False})  # changes what is printed, not the weights


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherFit:
    lr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    fit: Fit
    seeds: tuple[int, ...] = (0,)


def test_it_is_ten_hex_characters() -> None:
    assert re.fullmatch(r"[0-9a-f]{10}", identity(Fit(lr=0.1)))


def test_one_and_one_point_zero_are_one_value_after_the_schema() -> None:
    assert identity(strict_object(Fit, {"lr": 1})) == identity(strict_object(Fit, {"lr": 1.0}))


def test_key_order_and_left_out_defaults_do_not_count() -> None:
    assert identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})
    assert identity(Study(fit=Fit(lr=0.1))) == identity(Study(fit=Fit(lr=0.1), seeds=(0,)))


def test_fields_outside_the_identity_do_not_count_at_any_depth() -> None:
    assert identity(Study(fit=Fit(lr=0.1))) == identity(Study(fit=Fit(lr=0.1, log_every_steps=1)))
    assert identity({"fit": [Fit(lr=0.1)]}) == identity({"fit": [Fit(lr=0.1, log_every_steps=1)]})


def test_values_and_classes_count() -> None:
    assert identity(Fit(lr=0.1)) != identity(Fit(lr=0.2))
    assert identity(Study(fit=Fit(lr=0.1))) != identity(Study(fit=Fit(lr=0.1), seeds=(0, 1)))
    assert identity(Fit(lr=0.1)) != identity(OtherFit(lr=0.1))


def test_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not JSON compliant|Out of range"):
        identity({"x": float("nan")})
