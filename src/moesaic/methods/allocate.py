"""Allocation: how much of a budget each layer gets, where the layers need not all get the same.

A budget is the mean active share over layers; an allocation spreads it in whole blocks, or in parts of `GRAIN` where a
layer has more blocks. It is found on the model before any training, under oracle routing (or none, for a static slice),
so that it depends on neither router nor recipe. Shapes: T tokens, D model dim, L layers, K numbers of parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.methods.calibration import Calibration
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.select import AllBlocks, Selection
from moesaic.training.progress import ProgressLine

__all__ = ["Allocation", "AllocationJob", "GreedyLoss", "SolvedError", "cheapest_counts"]

GRAIN = 32  # parts of a layer: finer shares would cost more to find than they are worth


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocationJob:
    """What an allocation may use: `model` has all blocks on, and scores that stand for the best routing there is.

    `select` is the method's selection, of which every layer gets a share; `share` (0..1) is the wanted mean. `loss`
    gives the model's present task loss in nats on that many calibration tokens.
    """

    model: PreTrainedModel
    calibration: Calibration
    select: Selection
    share: float
    loss: Callable[[int], float]
    label: str

    def limit(self, layer: int, count: int) -> None:
        """Let sparse layer `layer` run `count` of its parts for a token, on average over the calibration tokens."""
        sparse = sparse_layers(self.model)[layer]
        sparse.select = self.selection(sparse, self.inputs_TD(layer), count)

    def selection(self, layer: SparseFFN, x_TD: Tensor, count: int) -> Selection:
        """The selection under which `layer` runs `count` of its parts for these inputs (T, D), on average."""
        num_blocks = layer.experts.num_blocks
        if layer.score is None:
            score_TX = x_TD.new_zeros(len(x_TD), num_blocks)
        else:
            score_TX = layer.score.activate(layer.score(x_TD, layer.experts))
        return self.select.matched(score_TX, count / parts(layer), num_blocks)

    def inputs_TD(self, layer: int, *, max_tokens: int = 1024) -> Tensor:
        """Calibration inputs (T, D) of a layer in the model's dtype."""
        dtype = sparse_layers(self.model)[layer].experts.up_BSD.dtype
        return self.calibration.inputs_TD(layer)[:max_tokens].to(dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation(ABC):
    """A rule that spreads a budget over layers. Uniform spreading is no allocation at all: `allocate: null`."""

    @abstractmethod
    def counts(self, job: AllocationJob) -> list[int]:
        """Per layer, how many of its parts run; at least one, and the mean share over layers is `job.share`."""

    def shares(self, job: AllocationJob) -> list[float]:
        """Per layer, the active share 0..1, for `SparseMethod.selections_at` and `StaticSlice`."""
        layers = sparse_layers(job.model)
        with torch.no_grad(), restored(layers):
            counts = self.counts(job)
        return [count / parts(layer) for count, layer in zip(counts, layers, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class GreedyLoss(Allocation):
    """From all parts on, always the part whose loss is cheapest: measured on the whole model, layers together.

    The loss is of `loss_tokens` calibration tokens.
    Source: arXiv:2408.14690 (TEAL's greedy search), on the model's loss and on FFN blocks.
    """

    loss_tokens: int = 2048

    def counts(self, job: AllocationJob) -> list[int]:
        layers = sparse_layers(job.model)
        count_L = [parts(layer) for layer in layers]
        surplus = sum(count_L) - total_parts(layers, job.share)
        with ProgressLine(f"{job.label} greedy", surplus, unit="parts") as line:
            for taken in range(surplus):
                removable = [i for i, count in enumerate(count_L) if count > 1]
                best = min(removable, key=lambda i: self._loss_after(job, i, count_L[i] - 1))
                count_L[best] -= 1
                job.limit(best, count_L[best])
                line.update(taken + 1)
        return count_L

    def _loss_after(self, job: AllocationJob, layer: int, count: int) -> float:
        sparse = sparse_layers(job.model)[layer]
        before = sparse.select
        job.limit(layer, count)
        loss = job.loss(self.loss_tokens)
        sparse.select = before
        return loss


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedError(Allocation):
    """The spread with the least sum over layers of ||y_S - y||^2 / ||y||^2, y_S a layer's output with S parts on.

    Each layer is scored alone on its calibration inputs; the best spread then follows exactly, by dynamic programming.
    """

    def counts(self, job: AllocationJob) -> list[int]:
        layers = sparse_layers(job.model)
        errors = [relative_errors(job, index) for index in range(len(layers))]
        return cheapest_counts(errors, total_parts(layers, job.share))


def relative_errors(job: AllocationJob, index: int) -> list[float]:
    """Per number of parts 1..K, the error of the layer's output over calibration tokens, relative to its square."""
    layer, x_TD = sparse_layers(job.model)[index], job.inputs_TD(index)
    layer.select = AllBlocks()
    whole_TD = layer(x_TD).float()
    errors = []
    for count in range(1, parts(layer) + 1):
        layer.select = job.selection(layer, x_TD, count)
        errors.append(((layer(x_TD).float() - whole_TD).square().sum() / whole_TD.square().sum()).item())
    return errors


def cheapest_counts(cost_LK: Sequence[Sequence[float]], total: int) -> list[int]:
    """Per layer a count 1..K (`cost_LK[l][count - 1]` is its cost) with sum `total` and the least total cost."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for cost_K in cost_LK:
        grown: dict[int, tuple[float, list[int]]] = {}
        for used, (cost, counts) in best.items():
            for count, added in enumerate(cost_K, start=1):
                at = used + count
                if at <= total and (at not in grown or cost + added < grown[at][0]):
                    grown[at] = (cost + added, [*counts, count])
        best = grown
    return best[total][1]


def parts(layer: SparseFFN) -> int:
    """Into how many parts a layer's share is cut."""
    return min(layer.experts.num_blocks, GRAIN)


def total_parts(layers: Sequence[SparseFFN], share: float) -> int:
    """How many parts all layers run together at the mean share. Raises ValueError if that is not one for each."""
    total = round(sum(share * parts(layer) for layer in layers))
    if total < len(layers):
        raise ValueError(f"a budget of {share:g} is {total} parts for {len(layers)} layers; each needs at least one")
    return total


@contextmanager
def restored(layers: Sequence[SparseFFN]) -> Iterator[None]:
    """Give each layer its selection back at the end of the scope."""
    before = [layer.select for layer in layers]
    try:
        yield
    finally:
        for layer, select in zip(layers, before, strict=True):
            layer.select = select
