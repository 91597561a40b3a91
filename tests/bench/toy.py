"""Sparse toys: a toy model whose FFNs are cut into equal blocks, with a linear router."""

from __future__ import annotations

from typing import Any

import torch
from toys import TOY_VOCAB, tiny_model
from transformers import PreTrainedModel

from moesaic.ffn.sites import find_ffns
from moesaic.sparse.combine import Combine
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN
from moesaic.sparse.model import convert_model
from moesaic.sparse.score import Linear
from moesaic.sparse.select import Selection, TopK


def sparse_toy(
    family: str = "llama", *, blocks: int = 4, select: Selection | None = None, executor: str = "auto", **config: Any
) -> PreTrainedModel:
    """The toy of `family`, cut in order into `blocks`; every token runs one of them unless `select` says otherwise."""
    model = tiny_model(family, **config)
    generator = torch.Generator().manual_seed(0)
    layers = []
    for site in find_ffns(model):
        ffn = site.read()
        experts = Experts.from_dense(ffn, torch.arange(ffn.width) // (ffn.width // blocks))
        score = Linear(bias=False).build(ffn.dim, blocks)
        score.initialise(experts, None, generator=generator)
        combine = Combine().build(ffn.dim, blocks)
        layers.append(SparseFFN(experts, score, select or TopK(k=1), combine, executor=executor))
    return convert_model(model, layers, None).eval()


def prompts_NC(rows: int = 4, columns: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, TOY_VOCAB, (rows, columns), generator=generator)
