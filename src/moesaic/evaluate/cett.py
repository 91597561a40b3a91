"""CETT-PPL-p%: how many FFN neurons a given model could leave out for p % more perplexity. An evaluation, no method.

CETT_l(e) = mean over tokens of ||sum of h_i down_i over neurons with n_i < e|| / ||FFN_l(x)||, n_i = |h_i| ||down_i||.
All layers share one bound on it; e_l is the largest threshold within the bound on a run without any masking.
Source: arXiv:2411.02335; repository `thunlp/SparsingLaw`, whose fit and report use the same text (ours do not).
Shapes: N windows, C context, T tokens, D model dim, F FFN width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.data.tokens import TokenSplit
from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import find_ffns
from moesaic.sparse.combine import Combine
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN, num_sequences, sparse_layers
from moesaic.sparse.model import convert_model
from moesaic.sparse.select import AllBlocks

__all__ = ["CettConfig", "as_one_block", "cett_curve", "cett_sparsity"]

_GRID = 65  # quantiles of n between which a threshold is searched


@dataclass(frozen=True, kw_only=True, slots=True)
class CettConfig:
    """The allowed increases of perplexity in %, and the held-out tokens to fit the bound on and to report on."""

    increases_pct: tuple[float, ...] = (1.0,)
    fit_tokens: int = 8192
    report_tokens: int = 32768
    tolerance: float = 1e-4  # of the bound, within 0..1

    def __post_init__(self) -> None:
        if not self.increases_pct or min(self.increases_pct) <= 0:
            raise ValueError(f"increases_pct={list(self.increases_pct)} must be percentages above 0")


def cett_sparsity(
    model: PreTrainedModel,
    split: TokenSplit,
    config: CettConfig,
    *,
    context: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """By allowed increase ("1" for 1 %): `sparsity`, the share 0..1 of neurons left out, and the increase it really is.

    Both on tokens that the bound was not fitted on. `model` is a causal language model with sparse layers, which keep
    their routing: neurons of blocks that do not run are left out already. For a dense one see `as_one_block`.
    Raises ValueError where the split is too short.
    """
    windows_NC = torch.as_tensor(split.blocks(context).astype("int64"))
    fit, report = max(1, config.fit_tokens // context), max(1, config.report_tokens // context)
    if fit + 1 > len(windows_NC):
        raise ValueError(
            f"cett.fit_tokens={config.fit_tokens} leaves nothing to report on of {len(windows_NC)} windows"
        )
    fit_NC, report_NC = windows_NC[:fit], windows_NC[fit : fit + report]
    layers = sparse_layers(model)
    curves = [cett_curve(layer, x_TD) for layer, x_TD in zip(layers, _inputs(model, fit_NC), strict=True)]
    base = {name: _nats(model, rows_NC) for name, rows_NC in (("fit", fit_NC), ("report", report_NC))}
    found = {}
    steps = math.ceil(math.log2(1 / config.tolerance))
    for index, increase in enumerate(config.increases_pct):
        low, high = 0.0, 1.0
        for step in range(steps):
            bound = (low + high) / 2
            with _masked(layers, [curve(bound) for curve in curves], []):
                dearer = _nats(model, fit_NC) - base["fit"] > math.log1p(increase / 100)
            low, high = (low, bound) if dearer else (bound, high)
            progress(index * steps + step + 1, len(config.increases_pct) * steps)
        kept: list[float] = []
        with _masked(layers, [curve(low) for curve in curves], kept):
            rise = _nats(model, report_NC) - base["report"]
        found[f"{increase:g}"] = {
            "sparsity": 1 - sum(kept) / len(kept),
            "measured_increase_pct": 100 * math.expm1(rise),
        }
    return found


def as_one_block(model: PreTrainedModel, pattern: FFNPattern | None = None) -> PreTrainedModel:
    """The dense `model` itself with each FFN as one block that always runs: the same function, neurons in reach."""
    layers = []
    for site in find_ffns(model, pattern):
        ffn = site.read()
        experts = Experts.from_dense(ffn, torch.zeros(ffn.width, dtype=torch.int64))
        layers.append(SparseFFN(experts, None, AllBlocks(), Combine().build(ffn.dim, 1)))
        site.release()
    return convert_model(model, layers, pattern)


def cett_curve(layer: SparseFFN, x_TD: Tensor) -> Callable[[float], float]:
    """The largest threshold e with CETT(e) <= bound, as a function of the bound, for a layer and its inputs."""
    h_TF, down_FD = _hidden(layer, x_TD, 1)
    size_TF = h_TF.abs() * down_FD.norm(dim=1)
    whole_T = layer(x_TD).float().norm(dim=1).clamp(min=1e-12)
    ordered = size_TF.flatten().sort().values

    def cett(threshold: float) -> float:
        left_out_TF = torch.where(size_TF < threshold, h_TF, 0)
        return ((left_out_TF @ down_FD).norm(dim=1) / whole_T).mean().item()

    # Just above a value, so that the neuron itself is left out; in front, what leaves out none.
    ranks = torch.linspace(0, len(ordered) - 1, _GRID).long().tolist()
    above = math.nextafter(ordered[-1].item(), math.inf)
    grid = [0.0, *(ordered[rank].item() for rank in ranks), above * (1 + 1e-6)]
    errors = [cett(threshold) for threshold in grid]

    def threshold_within(bound: float) -> float:
        at = max(index for index, error in enumerate(errors) if error <= bound)
        if at == len(grid) - 1:
            return grid[at]
        low, high = grid[at], grid[at + 1]
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if cett(middle) <= bound else (low, middle)
        return low

    return threshold_within


def _hidden(layer: SparseFFN, x_TD: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Hidden units (T, F) with the routing's weights, 0 in blocks that do not run, and down rows (F, D); float32."""
    experts = layer.experts
    rows = experts.rows()
    weight_TB = layer.route(x_TD, num_sequences=sequences)[0].weight_TB()
    h_TF = experts.hidden(x_TD, rows).float() * weight_TB.repeat_interleave(experts.block_size, dim=1)
    return h_TF, rows.down_RD.float()


@contextmanager
def _masked(layers: list[SparseFFN], threshold_L: list[float], kept: list[float]) -> Iterator[None]:
    """Within the scope each layer leaves out its neurons below its threshold; `kept` gets the share that stays."""

    def listener(threshold: float) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            assert isinstance(layer, SparseFFN)
            x = args[0]
            h_TF, down_FD = _hidden(layer, x.reshape(-1, x.shape[-1]), num_sequences(x))
            left_out_TF = h_TF.abs() * down_FD.norm(dim=1) < threshold
            kept.append(1 - left_out_TF.float().mean().item())
            return output - (torch.where(left_out_TF, h_TF, 0) @ down_FD).view(output.shape).to(output.dtype)

        return hook

    handles = [
        layer.register_forward_hook(listener(threshold)) for layer, threshold in zip(layers, threshold_L, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _inputs(model: PreTrainedModel, windows_NC: Tensor, *, max_tokens: int = 2048) -> list[Tensor]:
    """Per sparse layer, the inputs (T, D) of the first windows."""
    inputs: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _layer, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
        for layer in sparse_layers(model)
    ]
    try:
        model(input_ids=windows_NC[: max(1, max_tokens // windows_NC.shape[1])], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


@torch.no_grad()
def _nats(model: PreTrainedModel, windows_NC: Tensor, *, batch_size: int = 8) -> float:
    """Mean next-token loss in nats; windows are of equal length, so batches may be averaged by their size."""
    losses = [
        (model(input_ids=batch, labels=batch, use_cache=False).loss.item(), len(batch))
        for batch in windows_NC.split(batch_size)
    ]
    return sum(loss * rows for loss, rows in losses) / len(windows_NC)
