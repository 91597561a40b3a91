"""The calls that are timed: a prefill, and steps of one token on a KV cache, both on given tokens.

Tokens are given, not sampled: lengths are fixed, no end of text ends a run, and every arm does the same work.
Shapes: N sequences, C tokens of each prompt row.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moesaic.bench.ceilings import synchronise
from moesaic.bench.config import BenchConfig
from moesaic.bench.cost import Call, Phase

__all__ = ["Cell", "cells"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One phase at one batch size. `tokens` per sequence are computed in `steps` calls after `context` cached ones."""

    phase: Phase
    batch_size: int
    tokens: int
    context: int
    steps: int

    @property
    def call(self) -> Call:
        """One of its calls, for the cost model: of several steps, the one in the middle."""
        return Call(
            batch_size=self.batch_size,
            tokens=self.tokens // self.steps,
            context=self.context + (self.steps - 1) // 2,
        )

    def prepare(self, model: PreTrainedModel, prompts_NC: Tensor) -> Callable[[], Callable[[], Any]]:
        """An arm for `interleave`: called, it makes ready what the returned call needs, so that only that is timed."""
        rows_NC = prompts_NC[: self.batch_size]
        options = _options(model)
        device = rows_NC.device

        if self.phase == "prefill":
            ids_NC = rows_NC[:, : self.tokens]

            def prefill() -> None:
                model(input_ids=ids_NC, use_cache=True, **options)
                synchronise(device)

            return lambda: prefill

        given = model(input_ids=rows_NC[:, : self.context], use_cache=True, **options).past_key_values
        steps = [rows_NC[:, self.context + step][:, None] for step in range(self.steps)]

        def fresh_decode() -> Callable[[], None]:
            cache = copy.deepcopy(given)

            def decode() -> None:
                for ids_N1 in steps:
                    model(input_ids=ids_N1, past_key_values=cache, use_cache=True)
                synchronise(device)

            return decode

        return fresh_decode


def cells(config: BenchConfig) -> list[Cell]:
    """Every phase at every batch size."""
    found = []
    for phase in config.phases:
        for size in config.batch_sizes:
            if phase == "prefill":
                found.append(Cell(phase=phase, batch_size=size, tokens=config.prefill_tokens, context=0, steps=1))
            else:
                steps = config.decode_steps
                found.append(
                    Cell(phase=phase, batch_size=size, tokens=steps, context=config.decode_context, steps=steps)
                )
    return found


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """Generation needs the last token's logits only; models that can leave the others out, do."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
