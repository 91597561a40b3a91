import pytest

from moesaic.ffn.families import FFNPattern, matches


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("model.layers.*.mlp", "model.layers.12.mlp", True),
        ("model.layers.*.mlp", "model.layers.12.block.mlp", False),
        ("model.layers.*.mlp", "model.layers.12.mlp.experts", False),
        ("**.mlp", "mlp", True),
        ("**.mlp", "language_model.model.layers.0.mlp", True),
        ("**.mlp", "model.layers.0.xmlp", False),
        ("model.**.ff_*", "model.a.b.ff_2", True),
        ("model.**.ff_*", "other.a.b.ff_2", False),
        ("model.layers.*", "modelxlayersx1", False),
    ],
)
def test_stars_stand_for_parts_of_a_name(glob: str, name: str, expected: bool) -> None:
    assert matches(glob, name) is expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": None}, "either `up`"),
        ({"gate_up": "both"}, "either `up`"),
        ({"up": None, "gate_up": "both", "gate": "g"}, "`gate` and `gate_up` are both given"),
        ({"inline": True, "gate": "g"}, "cannot be gated"),
        ({"inline": True, "up": None, "gate_up": "both"}, "`inline` needs `up`"),
        ({"module": "**"}, "matches every module"),
    ],
)
def test_patterns_that_describe_no_ffn(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FFNPattern(**{"module": "**.mlp", "up": "u", "down": "d", "activation": "relu", **change})
