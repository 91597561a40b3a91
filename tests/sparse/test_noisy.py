"""The noisy router: its clean part, its noise in training only, its start."""

import math

import pytest
import torch
from toy_ffns import random_experts, random_ffn, random_inputs

from moesaic.sparse.noisy import Noisy, NoisyModule


def built(config: Noisy) -> NoisyModule:
    experts = random_experts(random_ffn(), 4)
    module = config.build(8, 4)
    assert isinstance(module, NoisyModule)
    module.initialise(experts, None, generator=torch.Generator().manual_seed(0))
    return module


EXPERTS = random_experts(random_ffn(), 4)


def test_evaluation_is_the_clean_tanh_router_and_deterministic() -> None:
    module, x_TD = built(Noisy()).eval(), random_inputs(9)
    expected_TB = (x_TD @ module.router.in_BD.T).tanh() @ module.router.out_BB.T
    torch.testing.assert_close(module(x_TD, EXPERTS), expected_TB)
    assert torch.equal(module(x_TD, EXPERTS), module(x_TD, EXPERTS))


def test_the_linear_router_starts_at_zero_and_so_with_equal_scores() -> None:
    module = built(Noisy(router="linear", activation="softmax")).eval()
    assert torch.equal(module.activate(module(random_inputs(5), EXPERTS)), torch.full((5, 4), 0.25))


@pytest.mark.parametrize("router", ["tanh_mlp", "linear"])
def test_training_noise_has_the_standard_deviation_ln_two_at_the_start(router: str) -> None:
    module, x_TD = built(Noisy(router=router)).train(), random_inputs(20_000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise_TB = module(x_TD, EXPERTS) - module.router(x_TD, EXPERTS)
    assert module.noise_std(x_TD).unique().item() == pytest.approx(math.log(2) + 0.01)
    assert noise_TB.std().item() == pytest.approx(0.7031, abs=0.01)
    assert noise_TB.mean().item() == pytest.approx(0, abs=0.01)


def test_noise_is_learned_and_can_be_switched_off() -> None:
    x_TD = random_inputs(5)
    noisy = built(Noisy()).train()
    noisy(x_TD, EXPERTS).sum().backward()
    assert noisy.noise_DB.grad.abs().sum() > 0
    quiet = built(Noisy(noise=False)).train()
    assert torch.equal(quiet(x_TD, EXPERTS), quiet.eval()(x_TD, EXPERTS))
    assert not any("noise" in name for name in quiet.state_dict())


def test_float32_under_autocast() -> None:
    module, x_TD = built(Noisy()).eval(), random_inputs(5)
    expected_TB, expected_std_TB = module(x_TD, EXPERTS), module.noise_std(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x_TD, EXPERTS), expected_TB)
        assert torch.equal(module.noise_std(x_TD), expected_std_TB)
