"""The routing trace: complete inside its scope, gone outside."""

import gc
import weakref

import pytest
import torch
from torch import nn
from toy_ffns import random_experts, random_ffn, random_inputs

from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.score import Linear
from moesaic.sparse.select import AllBlocks, Prefix, Selection, Threshold
from moesaic.sparse.trace import count_routing, observe_routing, record_routing


def layer_of(num_blocks: int, select: Selection, *, scored: bool = True) -> SparseFFN:
    experts = random_experts(random_ffn(), num_blocks)
    score = Linear().build(experts.dim, num_blocks) if scored else None
    if score is not None:
        score.initialise(experts, None, generator=torch.Generator().manual_seed(num_blocks))
    return SparseFFN(experts, score, select, Combine().build(experts.dim, num_blocks))


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(layer_of(4, Threshold(tau=0.1)), layer_of(6, Threshold(tau=0.0))).eval()


def state_of(model: nn.Module) -> list[tuple[str, list[str], int]]:
    return [
        (name, sorted(vars(module)), len(module._forward_hooks) + len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def test_records_every_forward_of_every_layer(model: nn.Module) -> None:
    inputs = [random_inputs(5), random_inputs(3, seed=2)]
    with record_routing(model) as trace:
        for x_TD in inputs:
            model(x_TD)
    assert [len(records) for records in trace.layers] == [2, 2]
    first = sparse_layers(model)[0]
    for x_TD, record in zip(inputs, trace.layers[0], strict=True):
        assert torch.equal(record.logits_TB, first.score(x_TD, first.experts))
        assert torch.equal(record.routing.active_TB(), record.score_TB > 0.1)
        assert record.executor in ("masked", "gather", "grouped", "loop")


def test_counts_equal_a_loop_over_tokens(model: nn.Module) -> None:
    with record_routing(model) as trace, count_routing(model) as counts:
        for seed in (1, 2):
            model(random_inputs(7, seed=seed))
    for layer, num_blocks in enumerate((4, 6)):
        expected = [0] * num_blocks
        for record in trace.layers[layer]:
            for token_blocks in record.routing.active_TB().tolist():
                for block, active in enumerate(token_blocks):
                    expected[block] += active
        for stats in (trace, counts):
            assert stats.counts_LB()[layer].tolist() == expected
            assert stats.mean_blocks_L()[layer] == pytest.approx(sum(expected) / 14)
            assert stats.active_frac_L()[layer] == pytest.approx(sum(expected) / 14 / num_blocks)
            assert stats.summary()["counts_LB"][layer] == expected
            assert stats.num_tokens_L[layer] == 14
    assert trace.executors_L() == counts.executors_L()


def test_an_unused_scope_counts_nothing(model: nn.Module) -> None:
    with count_routing(model) as counts:
        pass
    assert counts.mean_blocks_L() == counts.active_frac_L() == [0.0, 0.0]


@pytest.mark.parametrize(("select", "executor"), [(AllBlocks(), "slice"), (Prefix(k=3), "slice")])
@pytest.mark.parametrize("scored", [True, False])
def test_a_static_slice_is_recorded_as_what_it_is(select: Selection, executor: str, scored: bool) -> None:
    layer = layer_of(4, select, scored=scored)
    width = select.static_blocks(4)
    with record_routing(layer) as trace:
        layer(random_inputs(5))
    (record,) = trace.layers[0]
    assert record.executor == executor
    assert trace.counts_LB()[0].tolist() == [5] * width + [0] * (4 - width)
    assert (record.logits_TB is not None) == scored


def test_gradients_flow_through_the_trace(model: nn.Module) -> None:
    with record_routing(model) as trace:
        model(random_inputs(5))
    trace.layers[1][0].logits_TB.square().sum().backward()
    assert sparse_layers(model)[1].score.weight_BD.grad.abs().sum() > 0


def test_nothing_is_left_behind(model: nn.Module) -> None:
    before = state_of(model)
    with record_routing(model) as trace:
        model(random_inputs(5))
        assert state_of(model) != before  # the hooks, or this test would see nothing
    assert state_of(model) == before
    record = weakref.ref(trace.layers[0][0].routing.token_N)
    del trace
    gc.collect()
    assert record() is None
    model(random_inputs(5))


def test_nested_scopes_are_independent(model: nn.Module) -> None:
    with record_routing(model) as outer:
        model(random_inputs(5))
        with record_routing(model) as inner:
            model(random_inputs(2))
        model(random_inputs(3))
    assert [record.routing.num_tokens for record in outer.layers[0]] == [5, 2, 3]
    assert [record.routing.num_tokens for record in inner.layers[0]] == [2]


def test_an_exception_inside_closes_the_scope(model: nn.Module) -> None:
    before = state_of(model)
    wrong_size = random_inputs(5, dim=3)
    with pytest.raises(RuntimeError, match="shapes"), record_routing(model):
        model(wrong_size)
    assert state_of(model) == before


def test_a_callback_that_raises_closes_the_scope(model: nn.Module) -> None:
    before = state_of(model)

    def stop(*_: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observe_routing(model, stop):
        model(random_inputs(5))
    assert state_of(model) == before


def test_without_a_scope_no_record_is_made_for_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(4, AllBlocks())
    monkeypatch.setattr(SparseFFN, "_decide", lambda *_: pytest.fail("a record was made"))
    layer(random_inputs(5))
