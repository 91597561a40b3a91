"""The arms of one timing: the model as it routes itself, and control arms that say what its routing costs.

Shapes: T tokens, B blocks, K blocks per token, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.bench.config import Control
from moesaic.bench.cost import Load
from moesaic.sparse.executors import AUTO, EXECUTORS
from moesaic.sparse.layer import RoutingRecord, SparseFFN, sparse_layers
from moesaic.sparse.routing import Routing
from moesaic.sparse.select import AllBlocks, RoutingContext, Selection
from moesaic.sparse.trace import observe_routing

__all__ = ["Balanced", "LayerUse", "OwnArm", "control_arm", "observe", "own_arm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Balanced(Selection):
    """`k` blocks per token, dealt round: every block gets as many tokens as the others, whatever the scores."""

    k: int

    knob: ClassVar[str] = "k"

    def __call__(self, score_TX: Tensor, context: RoutingContext | None = None) -> Routing:
        num_tokens, num_blocks = score_TX.shape[0], score_TX.shape[1] if context is None else context.num_blocks
        position_TK = torch.arange(num_tokens * self.k, device=score_TX.device).view(num_tokens, self.k)
        return Routing.from_topk(position_TK % num_blocks, None, num_blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnArm:
    """One way to run the sparse layers: which selection and which executor in each of them."""

    control: Control | Literal["own"]
    name: str  # unique within a timing
    selections: tuple[Selection, ...]
    executors: tuple[str, ...]
    states: tuple[nn.Module | None, ...]  # what each selection keeps: another arm's selection in between drops it

    def apply(self, layers: Sequence[SparseFFN]) -> None:
        """Set the layers up; what they were set to before is the caller's to restore."""
        settings = zip(layers, self.selections, self.executors, self.states, strict=True)
        for layer, selection, executor, state in settings:
            layer.select, layer.executor = selection, executor
            layer.select_state = state


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerUse:
    """What one layer did in a call: the mean load of its forwards, and the executor that ran."""

    load: Load
    executor: str


def own_arm(layers: Sequence[SparseFFN], executor: str | None = None) -> OwnArm:
    """The model's own routing, with the executors that it is set to, or `executor` in every layer."""
    return OwnArm(
        control="own",
        name="own" if executor is None else f"own/{executor}",
        selections=tuple(layer.select for layer in layers),
        executors=tuple(layer.executor if executor is None else executor for layer in layers),
        states=tuple(layer.select_state for layer in layers),
    )


def control_arm(layers: Sequence[SparseFFN], control: Control, own_L: Sequence[LayerUse], tokens: int) -> OwnArm:
    """Another routing with the executors that the own routing ran, so that nothing but the routing differs.

    `own_L` is what the own routing did in a call of `tokens` tokens: the balanced arm runs as many blocks per token,
    rounded to a whole number of at least one. A layer whose own selection is static stays as it is.
    """
    selections: list[Selection] = []
    states: list[nn.Module | None] = []
    for layer, use in zip(layers, own_L, strict=True):
        if layer.static_blocks is not None:
            selections.append(layer.select)
        elif control == "all_blocks":
            selections.append(AllBlocks())
        else:
            selections.append(Balanced(k=max(1, round(use.load.assignments / tokens))))
        states.append(layer.select_state if selections[-1] is layer.select else None)
    executors = tuple(AUTO if use.executor not in EXECUTORS else use.executor for use in own_L)
    return OwnArm(
        control=control, name=control, selections=tuple(selections), executors=executors, states=tuple(states)
    )


def observe(model: PreTrainedModel, call: Callable[[], object]) -> list[LayerUse]:
    """What each sparse layer does in one forward call: the mean over those that `call` makes."""
    seen: list[list[RoutingRecord]] = [[] for _ in sparse_layers(model)]
    with observe_routing(model, lambda index, record: seen[index].append(record)):
        call()
    return [_use(records) for records in seen]


def _use(records: Sequence[RoutingRecord]) -> LayerUse:
    counts = [record.routing.counts_B for record in records]
    load = Load(
        assignments=fmean(float(counts_B.sum()) for counts_B in counts),
        union=fmean(float((counts_B > 0).sum()) for counts_B in counts),
    )
    return LayerUse(load=load, executor="+".join(sorted({record.executor for record in records})))
