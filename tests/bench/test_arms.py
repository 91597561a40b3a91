"""Arms: what is set up, what is seen, and that balance is balance."""

import pytest
import torch
from bench.toy import prompts_NC, sparse_toy
from torch import nn

from moesaic.bench.arms import Balanced, control_arm, observe, own_arm
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.select import AllBlocks, DynamicK, Prefix, TopK


@pytest.mark.parametrize(("num_tokens", "num_blocks", "k"), [(8, 4, 1), (8, 4, 3), (1, 4, 2), (5, 3, 2), (4, 4, 4)])
def test_balanced_deals_blocks_round(num_tokens: int, num_blocks: int, k: int) -> None:
    routing = Balanced(k=k)(torch.randn(num_tokens, num_blocks))
    assert routing.count_T().tolist() == [k] * num_tokens
    assert int(routing.counts_B.max() - routing.counts_B.min()) <= 1


def test_observe_takes_the_mean_over_forwards() -> None:
    model = sparse_toy(select=TopK(k=2))
    ids_NC = prompts_NC(1, 6)

    def two_calls() -> None:
        model(ids_NC[:, :4])
        model(ids_NC[:, 4:])

    uses = observe(model, two_calls)
    assert [use.load.assignments for use in uses] == [6.0, 6.0]  # (4 + 2 tokens) * 2 blocks / 2 calls
    assert all(2 <= use.load.union <= 4 and use.executor for use in uses)


def test_own_arm_keeps_what_is_set_and_changes_the_executor_on_demand() -> None:
    layers = sparse_layers(sparse_toy(executor="loop"))
    assert own_arm(layers).executors == ("loop", "loop")
    own_arm(layers, "grouped").apply(layers)
    assert [(layer.select, layer.executor) for layer in layers] == [(TopK(k=1), "grouped")] * 2


def test_controls_change_the_routing_and_nothing_else() -> None:
    model = sparse_toy(select=DynamicK(tau=0.2), executor="loop")
    layers = sparse_layers(model)
    ids_NC = prompts_NC(2, 8)
    uses = observe(model, lambda: model(ids_NC))
    everything = control_arm(layers, "all_blocks", uses, 16)
    balanced = control_arm(layers, "balanced", uses, 16)
    assert everything.executors == balanced.executors == ("loop", "loop")
    assert everything.selections == (AllBlocks(), AllBlocks())
    assert balanced.selections == tuple(Balanced(k=round(use.load.assignments / 16)) for use in uses)
    everything.apply(layers)
    assert [use.load.assignments for use in observe(model, lambda: model(ids_NC))] == [64.0, 64.0]


def test_a_static_layer_has_no_control() -> None:
    model = sparse_toy(select=Prefix(k=2))
    layers = sparse_layers(model)
    arm = control_arm(layers, "all_blocks", observe(model, lambda: model(prompts_NC(1, 4))), 4)
    assert arm.selections == (Prefix(k=2), Prefix(k=2))
    assert arm.executors == ("auto", "auto")  # a slice is no executor that could be asked for


class Remembering(TopK):
    """A rule with a state of its own."""

    def state(self, num_blocks: int) -> nn.Module:
        return nn.Linear(1, num_blocks)


def test_what_a_selection_keeps_survives_other_arms() -> None:
    model = sparse_toy(select=Remembering(k=1))
    layers = sparse_layers(model)
    kept = [layer.select_state for layer in layers]
    own = own_arm(layers)
    other = control_arm(layers, "all_blocks", observe(model, lambda: model(prompts_NC(1, 4))), 4)
    other.apply(layers)
    assert [layer.select_state for layer in layers] == [None, None]
    own.apply(layers)
    assert [layer.select_state for layer in layers] == kept
