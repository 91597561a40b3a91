"""Anatomies counted by hand, and the cost model against torch's FLOP counter on live layers and models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench.toy import prompts_NC, sparse_toy
from torch.utils.flop_counter import FlopCounterMode
from toys import CAUSAL_FAMILIES, TOY_LABELS, TOY_VOCAB, TOY_WIDTH, tiny_model

from moesaic.bench.anatomy import masked_anatomy, read_anatomy
from moesaic.bench.arms import observe
from moesaic.bench.calls import Cell
from moesaic.bench.cost import call_work, full_loads, router_work
from moesaic.sparse.channels import ChannelMasks
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.model import mask_channels
from moesaic.sparse.score import Oracle
from moesaic.sparse.select import DynamicK, TopK

D, F = 16, TOY_WIDTH


def grouped_flops(x_shape: list[int], w_shape: list[int], *_: Any, **__: Any) -> int:
    """torch has no formula for grouped products: N rows of K, each times K x M."""
    return 2 * x_shape[0] * x_shape[1] * w_shape[2]


def counted(call: Callable[[], object]) -> int:
    formulas = {torch.ops.aten._grouped_mm: grouped_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return int(counter.get_total_flops())


def test_dense_llama_by_hand() -> None:
    anatomy = read_anatomy(tiny_model("llama"))
    ffn = anatomy.ffns[0]
    assert len(anatomy.ffns) == 2
    assert ffn.num_blocks == 1
    assert (ffn.block.parameters, ffn.block.nbytes) == (3 * D * F, 3 * D * F * 4)
    assert ffn.block_flops == 2 * 3 * D * F
    assert (ffn.router.parameters, ffn.router_flops) == (0, 0)
    assert anatomy.body.parameters == 2 * (2 * D * D + 2 * D * 8)  # q and o; k and v with one head of 8
    assert anatomy.head.parameters == D * TOY_VOCAB
    assert (anatomy.attention.layers, anatomy.attention.width, anatomy.attention.cache_bytes) == (2, 16, 2 * 8 * 4)
    norms = 5 * D
    assert anatomy.parameters_total == (
        2 * 3 * D * F + anatomy.body.parameters + 2 * D * TOY_VOCAB + norms  # embedding and head are two matrices
    )


def test_plain_ffn_with_biases_by_hand() -> None:
    ffn = read_anatomy(tiny_model("opt")).ffns[0]
    assert ffn.block_flops == 2 * 2 * D * F
    assert ffn.block.parameters == 2 * D * F + F  # the output bias belongs to no block


@pytest.mark.parametrize(("family", "pooler", "head"), [("bert", D * D, 0), ("roberta", 0, D * D)])
def test_a_classifiers_head_is_what_lies_behind_its_encoder(family: str, pooler: int, head: int) -> None:
    anatomy = read_anatomy(tiny_model(f"{family}_classifier"))
    assert anatomy.head.parameters == head + D * TOY_LABELS
    assert anatomy.body.parameters == 2 * 4 * D * D + pooler
    assert len(anatomy.ffns) == 2


@pytest.mark.parametrize(("family", "head_transform"), [("bert", D * D), ("roberta", D * D)])
def test_a_masked_language_models_output_matrix_is_its_head(family: str, head_transform: int) -> None:
    anatomy = read_anatomy(tiny_model(family))
    assert anatomy.head.parameters == D * TOY_VOCAB
    assert anatomy.body.parameters == 2 * 4 * D * D + head_transform


def test_sparse_llama_by_hand() -> None:
    dense, own = read_anatomy(tiny_model("llama")), read_anatomy(sparse_toy("llama", blocks=4))
    ffn = own.ffns[0]
    assert ffn.num_blocks == 4
    assert ffn.block.parameters == 3 * D * F // 4
    assert ffn.block_flops == 2 * 3 * D * F // 4
    assert (ffn.router.parameters, ffn.router_flops) == (4 * D, 2 * 4 * D)
    assert (own.body, own.head, own.attention) == (dense.body, dense.head, dense.attention)
    assert own.parameters_total == dense.parameters_total + 2 * 4 * D


def test_an_oracle_router_costs_what_it_computes() -> None:
    model = sparse_toy("llama", blocks=4)
    for layer in sparse_layers(model):
        layer.score = Oracle(target="output_norm").build(D, 4)
    assert read_anatomy(model).ffns[0].router_flops >= 2 * 3 * D * F


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_dense_and_sparse_models_differ_in_their_ffns_only(family: str) -> None:
    dense, own = read_anatomy(tiny_model(family)), read_anatomy(sparse_toy(family))
    assert (own.body, own.head, own.attention) == (dense.body, dense.head, dense.attention)
    for cut, whole in zip(own.ffns, dense.ffns, strict=True):
        assert 4 * cut.block.parameters == whole.block.parameters
        assert 4 * cut.block_flops == whole.block_flops


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("select", [TopK(k=2), DynamicK(tau=0.3)])
def test_a_layer_multiplies_what_the_model_says(family: str, select: Any) -> None:
    model = sparse_toy(family, select=select)
    layer, anatomy = sparse_layers(model)[0], read_anatomy(model).ffns[0]
    x_TD = torch.randn(13, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assignments = layer.route(x_TD)[0].token_N.numel()
    router = router_work(anatomy, 13).flops
    for executor, pairs in {"grouped": assignments, "loop": assignments, "masked": 13 * 4}.items():
        layer.executor = executor
        expected = pairs * anatomy.block_flops + router
        assert counted(lambda: layer(x_TD)) == expected, executor


@torch.no_grad()
def whole_model_flops(family: str, cell: Cell, *, executor: str | None) -> tuple[int, float]:
    """Counted and modelled FLOPs of one call, attention without its causal mask: torch multiplies the whole square."""
    options: dict[str, Any] = {"attn_implementation": "eager"}
    model = tiny_model(family, **options) if executor is None else sparse_toy(family, executor=executor, **options)
    anatomy = read_anatomy(model)
    call = cell.prepare(model, prompts_NC())()
    loads = [use.load for use in observe(model, cell.prepare(model, prompts_NC())())] or full_loads(anatomy, cell.call)
    *parts, attention = call_work(anatomy, cell.call, loads)
    pairs = cell.batch_size * cell.call.tokens * (cell.context + cell.call.tokens)
    square = attention.flops / cell.call.attended * pairs
    return counted(call), sum(part.flops for part in parts) + square


@pytest.mark.parametrize("executor", [None, "grouped"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize(
    "cell",
    [
        Cell(phase="prefill", batch_size=2, tokens=9, context=0, steps=1),
        Cell(phase="decode", batch_size=3, tokens=1, context=11, steps=1),
    ],
)
def test_a_model_multiplies_what_the_model_says(family: str, cell: Cell, executor: str | None) -> None:
    found, expected = whole_model_flops(family, cell, executor=executor)
    assert found == expected


def test_a_masked_model_reads_the_share_of_each_matrix_that_its_inputs_want() -> None:
    model = tiny_model("llama")
    whole = read_anatomy(model)
    share = {"model.layers.0.mlp.down_proj": 0.25, "model.layers.1.self_attn.q_proj": 0.5}
    mask_channels(model, ChannelMasks(threshold=dict.fromkeys(share, 1.0)))
    anatomy, blocks_L = masked_anatomy(model, None, share)
    assert blocks_L == [pytest.approx((2 + 0.25) / 3), 1.0]
    assert anatomy.ffns == whole.ffns
    idle = model.get_submodule("model.layers.1.self_attn.q_proj").weight.numel() / 2
    assert anatomy.body.parameters == whole.body.parameters - idle
