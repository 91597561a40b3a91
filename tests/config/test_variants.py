"""Variants: a column fills what the method leaves open, and never what somebody set."""

import pytest

from moesaic.config.errors import ConfigError
from moesaic.config.variants import apply_variant

METHOD = {
    "name": "m",
    "variant": "corrected",
    "partition": {"_target_": "a.KMeans", "rows": "???"},
    "phases": {"router": {"target": "???", "loss": "bce"}, "heal": "???"},
    "variants": {
        "corrected": {
            "partition": {"_target_": "a.KMeans", "rows": "gate"},
            "phases": {"router": {"target": "l1"}, "heal": {"x": 1}},
        },
        "as_published": {"phases": {"router": {"target": "positive"}, "heal": None}},
    },
}


def method(**changes):
    return {**METHOD, **changes}


def test_a_column_fills_open_keys():
    filled = apply_variant(METHOD)
    assert filled["partition"]["rows"] == "gate"
    assert filled["phases"] == {"router": {"target": "l1", "loss": "bce"}, "heal": {"x": 1}}
    assert "variants" not in filled


def test_what_no_column_fills_is_left_to_the_default():
    assert "rows" not in apply_variant(method(variant="as_published"))["partition"]


def test_null_is_a_value_in_a_column_and_in_the_method():
    assert apply_variant(method(variant="as_published"))["phases"]["heal"] is None
    off = method(phases={"router": {"target": "???"}, "heal": None})
    assert apply_variant(off)["phases"]["heal"] is None


def test_a_key_that_has_a_value_wins():
    mine = method(phases={"router": {"target": "l2sq", "loss": "mse"}, "heal": "???"})
    assert apply_variant(mine)["phases"]["router"] == {"target": "l2sq", "loss": "mse"}


def test_another_component_is_left_alone():
    assert apply_variant(method(partition={"_target_": "a.Random"}))["partition"] == {"_target_": "a.Random"}


def test_unknown_variant_names_the_nearest():
    with pytest.raises(ConfigError, match=r"as_publishd.*did you mean 'as_published'.*corrected"):
        apply_variant(method(variant="as_publishd"))
