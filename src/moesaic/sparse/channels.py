"""Input-channel masks: linear layers for which small inputs count as 0, so that whole columns need not be read.

No blocks and no router: what is skipped is an input channel of a matrix, of the FFN or of the attention.
Source: arXiv:2408.14690 (TEAL). Shapes: C tokens of a sequence, D input channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ChannelCounts", "ChannelGate", "ChannelMasks", "count_channels", "install_masks", "unmasked"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelMasks:
    """By module name, the size that an input has to exceed; of a longer sequence the first tokens stay unmasked.

    Raises ValueError for a negative threshold, or a share outside 0..1.
    """

    threshold: dict[str, float] = field(default_factory=dict)
    dense_prefix_frac: float = 0.0  # of the tokens of one forward call; a call with a single token is masked whole

    def __post_init__(self) -> None:
        wrong = [name for name, threshold in self.threshold.items() if threshold < 0]
        if wrong:
            raise ValueError(f"threshold of {wrong[0]} is {self.threshold[wrong[0]]}; a size is at least 0")
        if not 0 <= self.dense_prefix_frac <= 1:
            raise ValueError(f"dense_prefix_frac={self.dense_prefix_frac} is outside 0..1")


class ChannelGate(nn.Module):
    """x where |x| > `threshold`, 0 elsewhere; threshold 0 changes nothing, since it removes zeros only."""

    def __init__(self, threshold: float, dense_prefix_frac: float) -> None:
        super().__init__()
        self.threshold, self.dense_prefix_frac = threshold, dense_prefix_frac
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """The masked inputs, shape (..., C, D) or (C, D) like `x`."""
        if not self.enabled:
            return x
        kept = x.abs() > self.threshold
        if self.dense_prefix_frac and x.shape[-2] > 1:
            kept[..., : math.ceil(self.dense_prefix_frac * x.shape[-2]), :] = True
        return torch.where(kept, x, 0)

    def extra_repr(self) -> str:
        """The threshold, for `print(model)`."""
        return f"threshold={self.threshold:g}"


def install_masks(model: nn.Module, masks: ChannelMasks) -> None:
    """Mask the inputs of the named linear layers of `model` from now on; no weight is touched, no key changes.

    Raises AttributeError for a name that is no module.
    """
    for name, threshold in masks.threshold.items():
        linear = model.get_submodule(name)
        linear.channel_gate = ChannelGate(threshold, masks.dense_prefix_frac)
        linear.register_forward_pre_hook(_gated)


def _gated(linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    gate = linear.channel_gate
    assert isinstance(gate, ChannelGate)
    return (gate(args[0]), *args[1:])


@contextmanager
def unmasked(model: nn.Module) -> Iterator[None]:
    """Within the scope no input of `model` is masked: its linear layers compute what their weights say."""
    gates = [module for module in model.modules() if isinstance(module, ChannelGate)]
    for gate in gates:
        gate.enabled = False
    try:
        yield
    finally:
        for gate in gates:
            gate.enabled = True


class ChannelCounts:
    """Per masked linear layer, how many of its inputs were not 0."""

    def __init__(self) -> None:
        self._active: dict[str, int] = {}
        self._seen: dict[str, int] = {}

    def add(self, name: str, masked: Tensor) -> None:
        """Count one forward of the layer `name`."""
        self._active[name] = self._active.get(name, 0) + int(masked.count_nonzero())
        self._seen[name] = self._seen.get(name, 0) + masked.numel()

    def active_frac(self) -> Mapping[str, float]:
        """By layer name, the share 0..1 of its inputs that were not 0; layers without a mask are not named."""
        return {name: active / self._seen[name] for name, active in self._active.items()}


@contextmanager
def count_channels(model: nn.Module) -> Iterator[ChannelCounts]:
    """Counts of all forwards of all masked layers while open."""
    counts = ChannelCounts()

    def listener(name: str) -> Any:
        return lambda _gate, _args, output: counts.add(name, output)

    gates = {name: module for name, module in model.named_modules() if isinstance(module, ChannelGate)}
    handles = [gate.register_forward_hook(listener(name.rpartition(".")[0])) for name, gate in gates.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
