"""What the sparse layers of a model decided, seen from outside and only while a scope is open.

Shapes: L sparse layers, T tokens, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.sparse.layer import RoutingRecord, sparse_layers

__all__ = ["RoutingCounts", "RoutingTrace", "count_routing", "observe_routing", "record_routing"]


class RoutingCounts:
    """Sums over all forwards in a scope, per sparse layer, in constant memory."""

    def __init__(self, num_blocks_L: list[int]) -> None:
        self.num_tokens_L = [0] * len(num_blocks_L)
        self._counts_LB = [torch.zeros(num_blocks, dtype=torch.int64) for num_blocks in num_blocks_L]
        self._executors_L: list[set[str]] = [set() for _ in num_blocks_L]
        self._notes_L: list[dict[str, float]] = [{} for _ in num_blocks_L]

    def add(self, layer: int, record: RoutingRecord) -> None:
        """Count one forward of one layer."""
        self.num_tokens_L[layer] += record.routing.num_tokens
        self._counts_LB[layer] += record.routing.counts_B.detach().cpu()
        self._executors_L[layer].add(record.executor)
        sums = self._notes_L[layer]
        for name, figure in record.notes.items():
            sums[name] = sums.get(name, 0.0) + record.routing.num_tokens * figure.item()

    def counts_LB(self) -> list[Tensor]:
        """Per layer, int64 (B,): how many tokens ran each block. A list, because layers may differ in B."""
        return [counts_B.clone() for counts_B in self._counts_LB]

    def mean_blocks_L(self) -> list[float]:
        """Per layer, the mean number of blocks that ran for a token; 0 where no token was seen."""
        pairs = zip(self._counts_LB, self.num_tokens_L, strict=True)
        return [int(counts_B.sum()) / max(1, num_tokens) for counts_B, num_tokens in pairs]

    def active_frac_L(self) -> list[float]:
        """Per layer, the share of (token, block) pairs that ran, 0..1."""
        return [mean / len(counts_B) for mean, counts_B in zip(self.mean_blocks_L(), self._counts_LB, strict=True)]

    def executors_L(self) -> list[list[str]]:
        """Per layer, the names of the executors that ran, sorted."""
        return [sorted(names) for names in self._executors_L]

    def notes_L(self) -> dict[str, list[float]]:
        """By name, the figures that the selections noted: per layer, the mean over tokens."""
        names = dict.fromkeys(name for sums in self._notes_L for name in sums)
        pairs = list(zip(self._notes_L, self.num_tokens_L, strict=True))
        return {name: [sums.get(name, 0.0) / max(1, tokens) for sums, tokens in pairs] for name in names}

    def summary(self) -> dict[str, Any]:
        """Counts and active shares as plain lists, for a record."""
        counts_LB = [counts_B.tolist() for counts_B in self._counts_LB]
        return {"counts_LB": counts_LB, "active_frac_L": self.active_frac_L(), "notes_L": self.notes_L()}


class RoutingTrace(RoutingCounts):
    """The counts, and every record: `layers[i]` lists those of sparse layer i, one per forward, gradients attached."""

    def __init__(self, num_blocks_L: list[int]) -> None:
        super().__init__(num_blocks_L)
        self.layers: list[list[RoutingRecord]] = [[] for _ in num_blocks_L]

    def add(self, layer: int, record: RoutingRecord) -> None:
        """Keep and count one forward of one layer."""
        super().add(layer, record)
        self.layers[layer].append(record)


@contextmanager
def observe_routing(model: nn.Module, callback: Callable[[int, RoutingRecord], None]) -> Iterator[None]:
    """While open, `callback(index, record)` runs at each forward of each sparse layer (index in module order)."""

    def listener(index: int) -> Callable[[nn.Module, tuple[Callable[[], RoutingRecord]], None], None]:
        return lambda _module, args, _output: callback(index, args[0]())

    handles = [layer.tap.register_forward_hook(listener(i)) for i, layer in enumerate(sparse_layers(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTrace]:
    """The trace of all forwards while open. It keeps every record: for long evaluations use `count_routing`."""
    trace = RoutingTrace(_num_blocks_L(model))
    with observe_routing(model, trace.add):
        yield trace


@contextmanager
def count_routing(model: nn.Module) -> Iterator[RoutingCounts]:
    """Counts of all forwards while open, whatever their number."""
    counts = RoutingCounts(_num_blocks_L(model))
    with observe_routing(model, counts.add):
        yield counts


def _num_blocks_L(model: nn.Module) -> list[int]:
    return [layer.experts.num_blocks for layer in sparse_layers(model)]
