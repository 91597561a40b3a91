"""What a live model is made of, as far as its cost goes: FFN layers, routers, other matrices, attention.

Shapes: D model dim, B blocks, S neurons per block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moesaic.ffn.dense import DenseFFN
from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import find_ffns
from moesaic.sparse.channels import unmasked
from moesaic.sparse.layer import SparseFFN, sparse_layers

__all__ = ["Anatomy", "Attention", "FFNLayer", "Matrix", "masked_anatomy", "read_anatomy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A weight that every token is multiplied with: `parameters` numbers in `nbytes` bytes."""

    parameters: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNLayer:
    """One FFN of `num_blocks` blocks (1 for a dense one): what one block holds, and what the router holds.

    `block_flops` is what one block multiplies for one token, `router_flops` what the router does for one token.
    `always` is what of the FFN itself every token multiplies, whatever its blocks: a gate product that is the score.
    """

    num_blocks: int
    block: Matrix
    block_flops: int
    router: Matrix
    router_flops: int
    always: Matrix = Matrix(parameters=0, nbytes=0)
    always_flops: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Sizes of the attention products: `width` = heads * head_dim; one cached token takes `cache_bytes` per layer."""

    layers: int
    width: int
    cache_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """A model's cost-bearing parts: FFNs, the other matrices of its layers (`body`), the output matrix (`head`).

    `parameters_total` counts every parameter once, embeddings, norms and routers included.
    """

    ffns: tuple[FFNLayer, ...]
    body: Matrix
    head: Matrix
    attention: Attention
    parameters_total: int


def read_anatomy(model: PreTrainedModel, pattern: FFNPattern | None = None) -> Anatomy:
    """The anatomy of a dense or sparse model; `pattern` says where an unknown family has its FFNs.

    Norms, embeddings look-ups and biases outside the FFNs are left out: they are no matrix products. In an
    encoder-decoder a token is counted as passing both stacks.
    """
    layers = sparse_layers(model)
    if layers:
        ffns = tuple(_sparse_ffn(layer) for layer in layers)
        inside = {id(module) for layer in layers for module in layer.modules()}
    else:
        with unmasked(model):
            ffns, inside = _dense_ffns(model, pattern)
    heads = _heads(model)
    inside |= {id(module) for module in heads}
    others = [module for module in _products(model) if id(module) not in inside]
    return Anatomy(
        ffns=ffns,
        body=_matrix(*(module.weight for module in others)),
        head=_matrix(*(module.weight for module in heads)),
        attention=_attention(model),
        parameters_total=sum(parameter.numel() for parameter in model.parameters()),
    )


def masked_anatomy(
    model: PreTrainedModel, pattern: FFNPattern | None, active_frac: Mapping[str, float]
) -> tuple[Anatomy, list[float]]:
    """The anatomy of a dense model of which a token reads `active_frac` (0..1, by module name) of some matrices.

    With it, per FFN, the share of it that is read: as many "blocks" as the dense FFN, which is one block, runs.
    """
    whole = read_anatomy(model, pattern)
    with unmasked(model):
        sites = find_ffns(model, pattern)
    parts_L = [[f"{site.name}.{part}" for part in site.pattern.linears.values()] for site in sites]
    blocks_L = [_share_read(model, parts, active_frac) for parts in parts_L]
    inside = {part for parts in parts_L for part in parts}
    body = _matrix(*(_weight(model, name) for name in active_frac if name not in inside))
    idle = body.parameters * (1 - _share_read(model, [n for n in active_frac if n not in inside], active_frac))
    read = 1 - idle / max(1, whole.body.parameters)
    scaled = Matrix(parameters=round(whole.body.parameters * read), nbytes=round(whole.body.nbytes * read))
    return replace(whole, body=scaled), blocks_L


def _share_read(model: PreTrainedModel, names: Sequence[str], active_frac: Mapping[str, float]) -> float:
    """Share of the numbers in the named matrices that are read; all where there are none."""
    sizes = [(_weight(model, name).numel(), active_frac.get(name, 1.0)) for name in names]
    return sum(size * share for size, share in sizes) / sum(size for size, _ in sizes) if sizes else 1.0


def _weight(model: PreTrainedModel, name: str) -> torch.Tensor:
    return cast(torch.Tensor, model.get_submodule(name).weight)


def _sparse_ffn(layer: SparseFFN) -> FFNLayer:
    """Everything beside the blocks counts as router: what the score holds, and the mean outputs of the combination."""
    first_is_score = layer.score is not None and layer.score.is_first_product
    whole = _ffn_layer(layer.experts.dense_ffn(), layer.experts.num_blocks, first_always=first_is_score)
    parts = [layer.combine] if layer.score is None else [layer.score, layer.combine]
    held = [weight for part in parts for weight in (*part.parameters(), *part.buffers()) if weight.is_floating_point()]
    return replace(whole, router=_matrix(*held), router_flops=_router_flops(layer) - whole.always_flops)


def _ffn_layer(ffn: DenseFFN, num_blocks: int, *, first_always: bool = False) -> FFNLayer:
    """`first_always`: the product that the activation is taken of runs for all neurons, and belongs to no block."""
    pairs = [(ffn.gate_FD, ffn.gate_bias_F), (ffn.up_FD, ffn.up_bias_F), (ffn.down_FD, None)]
    products = [pair for pair in pairs if pair[0] is not None]
    always, routed = (products[:1], products[1:]) if first_always else ([], products)
    always_flops, routed_flops = (2 * _matrix(*(matrix for matrix, _ in part)).parameters for part in (always, routed))
    blocks = _matrix(*(weight for pair in routed for weight in pair))
    return FFNLayer(
        num_blocks=num_blocks,
        block=Matrix(parameters=blocks.parameters // num_blocks, nbytes=blocks.nbytes // num_blocks),
        block_flops=routed_flops // num_blocks,
        router=_matrix(),
        router_flops=0,
        always=_matrix(*(weight for pair in always for weight in pair)),
        always_flops=always_flops,
    )


def _router_flops(layer: SparseFFN) -> int:
    """Multiplied for one token beside its blocks: counted while it runs, which holds for any score, oracles too."""
    weight = layer.experts.up_BSD
    x_TD = torch.ones(1, layer.experts.dim, dtype=weight.dtype, device=weight.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        routing, _ = layer.route(x_TD)
        layer.combine.fill(routing)
    return int(counter.get_total_flops())


def _dense_ffns(model: PreTrainedModel, pattern: FFNPattern | None) -> tuple[tuple[FFNLayer, ...], set[int]]:
    sites = find_ffns(model, pattern)
    parts = [f"{site.name}.{part}" for site in sites for part in site.pattern.linears.values()]
    return tuple(_ffn_layer(site.read(), 1) for site in sites), {id(model.get_submodule(part)) for part in parts}


def _products(model: PreTrainedModel) -> Iterator[nn.Linear | Conv1D]:
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield module


def _heads(model: PreTrainedModel) -> list[Any]:
    """What makes the logits: the output embeddings, or the layers that a classifier has behind its encoder."""
    output = model.get_output_embeddings()
    if output is not None:
        return [output]
    encoder = {id(module) for module in model.base_model.modules()}
    return [module for module in _products(model) if id(module) not in encoder]


def _attention(model: PreTrainedModel) -> Attention:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Attention(
        layers=config.num_hidden_layers,
        width=heads * head_dim,
        cache_bytes=2 * kv_heads * head_dim * model.dtype.itemsize,
    )


def _matrix(*weights: torch.Tensor | None) -> Matrix:
    held = [weight for weight in weights if weight is not None]
    return Matrix(
        parameters=sum(weight.numel() for weight in held),
        nbytes=sum(weight.numel() * weight.element_size() for weight in held),
    )
