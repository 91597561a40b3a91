"""MatFormer: which level each layer has, what it costs, and a fine-tune that trains every prefix."""

import itertools
import math

import pytest
import torch
from methods.toy import ids_NC, toy_conversion, toy_job, weights
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.bench.anatomy import read_anatomy
from moesaic.bench.cost import active_parameters
from moesaic.methods.allocate import AllocationJob
from moesaic.methods.base import SparseMethod, select_blocks
from moesaic.methods.matformer import MixNMatch, NestedFinetune, mixed_levels
from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.partition import Importance
from moesaic.sparse.score import RandomScore
from moesaic.sparse.select import Prefix
from moesaic.training.fit import FitConfig

METHOD = SparseMethod(
    name="matformer",
    partition=Importance(num_blocks=8),
    score=None,
    select=Prefix(k=8),
    combine=Combine(),
    oracle=RandomScore(),
    adapt_each_budget=False,
    calibration_tokens=512,
)


@pytest.mark.parametrize("num_layers", [1, 4, 12, 31])
@pytest.mark.parametrize("share_E", [(0.25, 0.5, 0.75, 1.0), (0.125, 0.25, 0.5, 1.0)])
def test_levels_do_not_fall_with_depth_and_meet_the_target_from_below(num_layers, share_E):
    for percent in range(math.ceil(100 * share_E[0]), 101):
        share = percent / 100
        levels = mixed_levels(share_E, share, num_layers)
        mean = sum(share_E[level] for level in levels) / num_layers
        largest_step = max(b - a for a, b in itertools.pairwise(share_E))
        assert levels == sorted(levels)
        assert levels[-1] - levels[0] <= 1
        assert share - largest_step / num_layers < mean + 1e-9 <= share + 2e-9


def test_a_budget_below_the_smallest_level_is_refused():
    with pytest.raises(ValueError, match=r"0\.1 is below the smallest level, 0\.25"):
        mixed_levels((0.25, 1.0), 0.1, 4)


def test_the_allocation_gives_whole_levels(tmp_path):
    _, model, calibration = toy_conversion(METHOD, tmp_path)
    job = AllocationJob(
        model=model, calibration=calibration, select=Prefix(k=8), share=0.375, loss=lambda _: 0.0, label=""
    )
    assert MixNMatch(levels="geometric").counts(job) == [2, 4]


def test_every_prefix_learns_and_the_selection_comes_back(tmp_path):
    _, model, calibration = toy_conversion(METHOD, tmp_path)
    select_blocks(model, Prefix(k=4))
    before, losses = weights(model), {}
    for when in ("before", "after"):
        for k in (1, 2, 4, 8):
            select_blocks(model, Prefix(k=k))
            with torch.no_grad():
                losses[when, k] = model(input_ids=ids_NC(16), labels=ids_NC(16)).loss.item()
        select_blocks(model, Prefix(k=4))
        if when == "before":
            phase = NestedFinetune(fit=FitConfig(steps=40, batch_size=8, lr=1e-2), levels="geometric")
            facts = phase.run(toy_job(model, calibration, tmp_path / "fit"))
    assert facts["steps"] == 40
    assert all(losses["after", k] < losses["before", k] for k in (1, 2, 4, 8))
    assert {layer.select for layer in sparse_layers(model)} == {Prefix(k=4)}
    assert all(".experts." in name for name, value in weights(model).items() if not torch.equal(value, before[name]))


@pytest.mark.parametrize(("level", "billions"), [(1, 3.014), (2, 4.423), (3, 5.832), (4, 7.241)])
def test_active_parameters_of_nested_experts_of_a_7b_model(level, billions):
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        dense = read_anatomy(AutoModelForCausalLM.from_config(config), None)
    assert active_parameters(dense, [level / 4] * 32) / 1e9 == pytest.approx(billions, abs=1e-3)
