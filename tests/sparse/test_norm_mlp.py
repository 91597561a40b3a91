"""D2DMoE's router: its formula, its size, its start and what it refuses."""

import pytest
import torch
from toy_ffns import random_experts, random_ffn, random_inputs

from moesaic.sparse.norm_mlp import NormMLP
from moesaic.sparse.score import ScoreModule


def built(config: NormMLP, seed: int = 0) -> ScoreModule:
    experts = random_experts(random_ffn(), 4)
    module = config.build(8, 4)
    module.initialise(experts, None, generator=torch.Generator().manual_seed(seed))
    return module


def test_formula_in_float32_under_autocast_too() -> None:
    module, x_TD = built(NormMLP(hidden_dim=5)), random_inputs(7)
    expected_TB = ((x_TD.double() @ module.in_WD.T.double()).relu() @ module.out_BW.T.double()).abs()
    experts = random_experts(random_ffn(), 4)
    torch.testing.assert_close(module(x_TD, experts), expected_TB.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x_TD, experts), module(x_TD, experts).float())
        torch.testing.assert_close(module(x_TD, experts), expected_TB.float())
    assert (module(x_TD, experts) >= 0).all()


@pytest.mark.parametrize(("hidden_dim", "width"), [(None, 2), (128, 128)])
def test_the_hidden_width_is_a_quarter_of_the_model_or_as_given(hidden_dim: int | None, width: int) -> None:
    module = NormMLP(hidden_dim=hidden_dim).build(8, 4)
    assert {name: tuple(value.shape) for name, value in module.named_parameters()} == {
        "in_WD": (width, 8),
        "out_BW": (4, width),
    }
    assert NormMLP().build(2, 4).in_WD.shape == (1, 2)


def test_the_start_depends_on_the_generator_alone_and_fills_its_range() -> None:
    first, again, other = (built(NormMLP(hidden_dim=64), seed) for seed in (0, 0, 1))
    assert torch.equal(first.in_WD, again.in_WD)
    assert not torch.equal(first.in_WD, other.in_WD)
    for weight, inputs in ((first.in_WD, 8), (first.out_BW, 64)):
        assert 0.9 * inputs**-0.5 < weight.abs().max() <= inputs**-0.5


def test_no_hidden_unit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"score\.hidden_dim=0 must be at least 1; null is a quarter"):
        NormMLP(hidden_dim=0)
