"""TEAL: thresholds are the quantiles that they claim, the greedy search ends where it should, sizes of the matrices."""

import math

import pytest
import torch
from methods.toy import ids_NC, toy_calibration
from toys import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.methods.base import ConvertJob
from moesaic.methods.teal import Teal, greedy_sparsity, masked_linears, quantile_of_sorted
from moesaic.sparse.channels import count_channels


def converted(tmp_path, p: float, **settings):
    method = Teal(name="teal", budgets=(p,), calibration_tokens=512, search_tokens=64, **settings)
    calibration = toy_calibration(tiny_model("llama"), tmp_path)
    return method.convert(
        ConvertJob(model=tiny_model("llama"), pattern=None, calibration=calibration, budget=p, seed=0)
    )


@pytest.mark.parametrize("p", [0.25, 0.4, 0.5])
def test_quantiles_of_a_normal_are_those_of_its_table(p):
    sizes = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).abs().sort().values
    table = {0.25: 0.319, 0.4: 0.524, 0.5: 0.674}
    assert quantile_of_sorted(sizes, p) == pytest.approx(table[p], abs=4e-3)
    assert quantile_of_sorted(sizes, p) == pytest.approx(math.sqrt(2) * torch.erfinv(torch.tensor(p)).item(), abs=4e-3)


def test_zero_is_off(tmp_path):
    model = converted(tmp_path, 0.0, spread="uniform")
    assert torch.equal(model(ids_NC()).logits, tiny_model("llama")(ids_NC()).logits)


@pytest.mark.parametrize("p", [0.3, 0.6])
def test_inputs_drop_by_the_share_asked_for(p, tmp_path):
    model = converted(tmp_path, p, spread="uniform", dense_prefix_frac=0.0)
    with count_channels(model) as counts:
        model(ids_NC(100))
    share = counts.active_frac()
    assert len(share) == 2 * 7
    # Inputs behind a mask have changed themselves, so they are near p, not at it; those of the first layer are at it.
    first = [share[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]
    assert first == pytest.approx([1 - p] * 3, abs=0.02)


def test_more_p_drops_more_of_the_same(tmp_path):
    thresholds = []
    for p in (0.2, 0.5, 0.8):
        model = converted(tmp_path / str(p), p, spread="uniform")
        gates = {name: m.channel_gate.threshold for name, m in model.named_modules() if hasattr(m, "channel_gate")}
        thresholds.append(torch.tensor(list(gates.values())))
    assert (thresholds[0] < thresholds[1]).all()
    assert (thresholds[1] < thresholds[2]).all()


def test_scope(tmp_path):
    model = tiny_model("llama")
    ffn = masked_linears(model, None, "ffn")
    assert [len(names) for names in ffn] == [3, 3]
    assert all(".mlp." in name for names in ffn for name in names)
    assert [len(names) for names in masked_linears(model, None, "all_linear")] == [7, 7]


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_greedy_ends_exactly_at_its_target(target):
    weights = {"q": 1.0, "gate": 2.6875, "down": 2.6875}
    price = {"q": 1.0, "gate": 0.1, "down": 0.5}
    found = greedy_sparsity(lambda p: sum(price[n] * weights[n] * p[n] ** 2 for n in p), weights, target, step=0.05)
    assert sum(weights[n] * found[n] for n in found) / sum(weights.values()) == pytest.approx(target)
    assert all(0 <= p <= 0.99 for p in found.values())
    assert found["gate"] > found["down"] > found["q"]
    # Where marginal prices are equal lies the optimum: p is inverse to the price, but for the size of a step.
    if found["gate"] < 0.99:
        assert found["down"] * price["down"] == pytest.approx(found["gate"] * price["gate"], abs=0.05)


def test_greedy_does_no_worse_than_uniform_on_its_own_measure(tmp_path):
    torch.manual_seed(0)
    ids = ids_NC(32)
    dense = tiny_model("llama")(ids).logits
    errors = [
        (converted(tmp_path / spread, 0.5, spread=spread, dense_prefix_frac=0.0)(ids).logits - dense).norm().item()
        for spread in ("greedy", "uniform")
    ]
    assert errors[0] <= errors[1] * 1.02


def test_sizes_of_llama_2_7b():
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32, vocab_size=8
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (names,) = masked_linears(model, None, "all_linear")
    sizes = [model.get_submodule(name).weight.numel() / 4096**2 for name in names]
    assert sizes == [1, 1, 1, 1, 2.6875, 2.6875, 2.6875]
    assert sum(sizes) == 12.0625


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"budgets": (1.0,)}, r"p=1\.0 is outside 0\.\.0\.99"), ({"calibration_tokens": 0}, "calibration_tokens=0")],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Teal(**{"name": "teal", "calibration_tokens": 1, **settings})
