"""TEAL: input channels of linear layers that are small for a token are skipped. No training, no router, no blocks.

Source: arXiv:2408.14690; repository `FasterDecoding/TEAL` where variants say so; see conf/method/teal.yaml.
Shapes: N sequences, C context, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moesaic.data.objective import forward
from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import find_ffns
from moesaic.methods.base import ConvertJob, Method
from moesaic.methods.calibration import Calibration
from moesaic.methods.static import decoder_layers
from moesaic.sparse.channels import ChannelGate, ChannelMasks
from moesaic.sparse.model import mask_channels
from moesaic.training.progress import ProgressLine

__all__ = ["LayerSearch", "Teal", "greedy_sparsity", "quantile_of_sorted"]

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments of a decoder layer

_HIGHEST = 0.99  # no matrix loses more of its inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Teal(Method):
    """Every masked linear layer drops its inputs below a quantile of their size on calibration tokens.

    A budget is p, the share of inputs dropped, weighted by the size of the matrices. `scope`: all linear layers of the
    decoder, or those of its FFNs. `spread`: uniform, every matrix drops p; greedy, within each decoder layer always the
    matrix whose next `step` costs the layer's output least, on `search_tokens` tokens. `dense_prefix_frac` of the
    first tokens of a prefill stay whole. Raises ValueError for a p outside 0..0.99. Decoders only.
    """

    scope: Literal["all_linear", "ffn"] = "all_linear"
    spread: Literal["uniform", "greedy"] = "greedy"
    dense_prefix_frac: float = 0.01
    step: float = 0.1  # of the inputs of a D x D matrix; a larger matrix steps less
    search_tokens: int = 512

    converts_per_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if not 0 <= budget <= _HIGHEST:
                raise ValueError(f"budgets: p={budget} is outside 0..{_HIGHEST}, the share of inputs dropped")
        if not self.calibration_tokens:
            raise ValueError(
                "calibration_tokens=0, but thresholds are quantiles of calibration inputs. Set it above 0."
            )

    @property
    def knob(self) -> str:
        return "p"

    def conversion(self) -> dict[str, Any]:
        names = ("scope", "spread", "dense_prefix_frac", "step", "search_tokens")
        return {"method": "Teal", **{name: getattr(self, name) for name in names}}

    def convert(self, job: ConvertJob) -> PreTrainedModel:
        assert job.calibration is not None
        assert job.budget is not None
        model = job.model.eval()
        names_by_layer = masked_linears(model, job.pattern, self.scope)
        sizes = input_sizes(model, [name for names in names_by_layer for name in names], job.calibration)
        calls = layer_calls(model, job.calibration, self.search_tokens)
        threshold: dict[str, float] = {}
        with ProgressLine(f"{self.name}@{job.budget:g} {self.spread}", len(names_by_layer), unit="layers") as line:
            for index, (layer, names) in enumerate(zip(decoder_layers(model), names_by_layer, strict=True)):
                sparsity = dict.fromkeys(names, job.budget)
                if self.spread == "greedy":
                    linears = {name: model.get_submodule(name) for name in names}
                    search = LayerSearch(layer, calls[index], linears, sizes)
                    square = model.config.hidden_size**2
                    weights = {name: linear.weight.numel() / square for name, linear in linears.items()}
                    sparsity = greedy_sparsity(search.error, weights, job.budget, self.step)
                threshold |= {name: quantile_of_sorted(sizes[name], p) for name, p in sparsity.items()}
                line.update(index + 1)
        masks = ChannelMasks(threshold=threshold, dense_prefix_frac=self.dense_prefix_frac)
        return mask_channels(model, masks)


def masked_linears(model: PreTrainedModel, pattern: FFNPattern | None, scope: str) -> list[list[str]]:
    """By decoder layer, the names of the linear layers in `scope`."""
    stack = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    in_ffns = {f"{site.name}.{part}" for site in find_ffns(model, pattern) for part in site.pattern.linears.values()}
    chosen = []
    for index, layer in enumerate(stack):
        inside = [f"{prefix}.{index}.{name}" for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        chosen.append([name for name in inside if scope == "all_linear" or name in in_ffns])
    return chosen


@torch.no_grad()
def input_sizes(
    model: PreTrainedModel, names: Sequence[str], calibration: Calibration, *, max_values: int = 1_000_000
) -> dict[str, Tensor]:
    """Sorted |x| of each linear layer's inputs in the dense model, up to `max_values` of each, float32."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            values = args[0].abs().flatten().float()
            # Odd, so that it walks through all channels: their number is nearly always even.
            stride = math.ceil(values.numel() * calibration.num_windows / max_values) | 1
            seen[name].append(values[::stride].clone())

        return hook

    with hooked(model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names):
        for window in range(calibration.num_windows):
            forward(model, calibration.windows(window, window + 1))
    return {name: torch.cat(parts).sort().values for name, parts in seen.items()}


@torch.no_grad()
def layer_calls(model: PreTrainedModel, calibration: Calibration, max_tokens: int) -> list[Call]:
    """What each decoder layer of the dense model is called with on the first `max_tokens` calibration tokens."""
    calls: list[Call] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, {**kwargs, "past_key_values": None, "use_cache": False}))

    windows = max(1, max_tokens * calibration.num_windows // calibration.num_tokens)
    with hooked(layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in decoder_layers(model)):
        forward(model, calibration.windows(0, windows))
    return calls


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks at the end of the scope."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


class LayerSearch:
    """What masking some matrices of one decoder layer does to its output, on the last quarter of each sequence."""

    def __init__(
        self,
        layer: nn.Module,
        call: Call,
        linears: dict[str, nn.Module],
        sizes: dict[str, Tensor],
    ) -> None:
        self._layer, self._linears, self._sizes = layer, linears, sizes
        self._args, self._kwargs = call
        self._whole_NCD = self._output()

    @torch.no_grad()
    def error(self, sparsity: dict[str, float]) -> float:
        """Mean over tokens of the length of the change, when each named matrix drops its share of inputs."""
        with masked(self._linears, {name: quantile_of_sorted(self._sizes[name], p) for name, p in sparsity.items()}):
            return (self._output() - self._whole_NCD).norm(dim=-1).mean().item()

    @torch.no_grad()
    def _output(self) -> Tensor:
        result = self._layer(*self._args, **self._kwargs)
        hidden_NCD = result[0] if isinstance(result, tuple) else result
        return hidden_NCD[:, -max(1, hidden_NCD.shape[1] // 4) :].float()


@contextmanager
def masked(linears: dict[str, nn.Module], threshold: dict[str, float]) -> Iterator[None]:
    """Within the scope the named linear layers see masked inputs."""

    def gated(value: float) -> Any:
        gate = ChannelGate(value, dense_prefix_frac=0.0)
        return lambda _module, args: (gate(args[0]), *args[1:])

    with hooked(linears[name].register_forward_pre_hook(gated(value)) for name, value in threshold.items()):
        yield


def greedy_sparsity(
    error: Callable[[dict[str, float]], float], weights: dict[str, float], target: float, step: float
) -> dict[str, float]:
    """By matrix, the share of inputs dropped: `step` / weight at a time where `error(sparsity)` grows least.

    Stops when the mean, weighted by size, reaches `target`; the last step is cut to end there exactly.
    Source: arXiv:2408.14690, block-wise greedy search, with the true sizes of all matrices as `weights`.
    """
    sparsity = dict.fromkeys(weights, 0.0)
    total = sum(weights.values())
    missing = target * total
    while missing > 1e-9 * total:
        trials = {}
        for name, weight in weights.items():
            raised = min(sparsity[name] + min(step, missing) / weight, _HIGHEST)
            if raised > sparsity[name]:
                trials[name] = {**sparsity, name: raised}
        best = min(trials, key=lambda name: error(trials[name]))
        missing -= (trials[best][best] - sparsity[best]) * weights[best]
        sparsity = trials[best]
    return sparsity


def quantile_of_sorted(size_N: Tensor, p: float) -> float:
    """The size that a share `p` of the sorted sizes does not exceed; p = 0 is off, a threshold of 0."""
    return 0.0 if p == 0 else size_N[min(len(size_N) - 1, round(p * len(size_N)) - 1)].item()
