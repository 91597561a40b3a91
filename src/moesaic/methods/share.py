"""The phase that finds, after training, at which knob a level router runs the wanted share of the FFNs.

Shapes: T tokens, E levels, K shares.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.data.objective import forward
from moesaic.methods.base import AdaptJob, Phase, select_blocks
from moesaic.methods.calibration import Calibration
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.levels import Nested, SolvedKnobs, solve_rising
from moesaic.sparse.trace import count_routing

__all__ = ["SolveShares", "calibration_batches", "mean_share"]

_WINDOWS_AT_ONCE = 8
_MOST_DOUBLINGS = 14


@dataclass(frozen=True, kw_only=True, slots=True)
class SolveShares(Phase):
    """Phase `shares`: one knob per share of the selection, for all layers, with the whole model run at each trial.

    A layer's share rises with the knob, but narrow early layers change what later ones see, so the model's share rises
    only nearly: the nearest share that was seen is kept, and recorded beside the wanted one. `max_tokens` calibration
    tokens are run per trial, `tolerance` is a share. Raises ValueError for a selection without such a knob.
    """

    max_tokens: int = 8192
    tolerance: float = 0.01

    def run(self, job: AdaptJob) -> dict[str, Any]:
        started = time.monotonic()
        select = sparse_layers(job.model)[0].select
        if not isinstance(select, Nested):
            raise ValueError(f"SolveShares solves the knob of Nested, but select is {type(select).__name__}.")
        for layer in sparse_layers(job.model):
            # Not the state the layer comes with: it may be of other shares.
            state = select.state(layer.experts.num_blocks)
            layer.select_state = None if state is None else state.to(layer.experts.up_BSD.device)
        if not select.shares:
            return {"tokens": 0, "steps": 0, "wall_seconds": 0.0, "skipped": "select.shares is empty"}
        assert job.calibration is not None
        job.model.eval()
        batches = calibration_batches(job.calibration, self.max_tokens, job.model.device)
        solved = []
        for share in select.shares:
            select_blocks(job.model, select.with_budget(share))
            solved.append(self.solve(job.model, batches, share, num_knobs=len(select.shares)))
        set_knobs(job.model, [knob for knob, _ in solved])
        select_blocks(job.model, select)
        points = [
            {"wanted": share, "realised": found, "knob": knob}
            for share, (knob, found) in zip(select.shares, solved, strict=True)
        ]
        return {"tokens": 0, "steps": 0, "wall_seconds": time.monotonic() - started, "shares": points}

    def solve(
        self, model: PreTrainedModel, batches: list[dict[str, Tensor]], share: float, *, num_knobs: int
    ) -> tuple[float, float]:
        """(knob, its share): the knob whose share is nearest to `share`."""

        def share_at(knob: float) -> float:
            set_knobs(model, [knob] * num_knobs)
            return mean_share(model, batches)

        low, high = bracket(share_at, share)
        return solve_rising(share_at, share, low, high, tolerance=self.tolerance)


def set_knobs(model: PreTrainedModel, knobs: list[float]) -> None:
    """Give every layer these knobs, one per solved share."""
    for layer in sparse_layers(model):
        assert isinstance(layer.select_state, SolvedKnobs)
        layer.select_state.knob_K.copy_(torch.tensor(knobs))


def bracket(share_at: Callable[[float], float], share: float) -> tuple[float, float]:
    """Knobs around 0, doubled until the wanted share lies between theirs or there is nothing left to gain."""
    low = high = 1.0
    for _ in range(_MOST_DOUBLINGS):
        if share_at(-low) <= share:
            break
        low *= 2
    for _ in range(_MOST_DOUBLINGS):
        if share_at(high) >= share:
            break
        high *= 2
    return -low, high


@torch.inference_mode()
def mean_share(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> float:
    """The mean over layers of the share of (token, block) pairs that run, 0..1."""
    with count_routing(model) as counts:
        for batch in batches:
            forward(model, batch)
    share_L = counts.active_frac_L()
    return sum(share_L) / len(share_L)


def calibration_batches(calibration: Calibration, max_tokens: int, device: torch.device) -> list[dict[str, Tensor]]:
    """The first calibration windows, up to `max_tokens` tokens or one window, on the device of a model."""
    last = min(calibration.num_windows, max(1, max_tokens * calibration.num_windows // calibration.num_tokens))
    firsts = range(0, last, _WINDOWS_AT_ONCE)
    batches = [calibration.windows(first, min(first + _WINDOWS_AT_ONCE, last)) for first in firsts]
    return [{name: column.to(device) for name, column in batch.items()} for batch in batches]
