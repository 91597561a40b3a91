"""Time a model beside the dense one: every phase and batch size, in turns, on real tokens.

Shapes: N sequences, C tokens of each prompt row.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.bench.anatomy import Anatomy, read_anatomy
from moesaic.bench.arms import OwnArm, control_arm, observe, own_arm
from moesaic.bench.calls import Cell, cells
from moesaic.bench.ceilings import Ceilings, measure_ceilings
from moesaic.bench.check import check_outputs
from moesaic.bench.config import BenchConfig
from moesaic.bench.cost import Load, full_loads
from moesaic.bench.rows import speed_row
from moesaic.bench.samples import Arm, Clock, interleave
from moesaic.ffn.families import FFNPattern
from moesaic.sparse.layer import SparseFFN, sparse_layers

__all__ = ["Timing", "time_models"]

DENSE = "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """`speed` holds one row per phase, batch size and arm, `samples` one per timed call, `ceilings` the machine's."""

    speed: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    ceilings: Ceilings

    def plain(self) -> dict[str, Any]:
        """Without the samples, as it stands in a record."""
        return {"speed": self.speed, "ceilings": asdict(self.ceilings)}


@torch.inference_mode()
def time_models(
    dense: PreTrainedModel,
    own: PreTrainedModel,
    prompts_NC: Tensor,
    config: BenchConfig,
    *,
    pattern: FFNPattern | None = None,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Times of `own` at its present selection beside those of `dense`, on the rows of `prompts_NC` (int64).

    Both are put into eval mode; decode is timed only where routing can be done token by token. A model without sparse
    layers is timed as it is. `pattern` says where an unknown family has its FFNs.

    Raises: OutputMismatchError where an executor differs from the reference, ValueError for models that do not
    generate.
    """
    for model in (dense, own):
        _refuse_not_causal(model)
        model.eval()
    nbytes = sum(parameter.nbytes for parameter in dense.parameters())
    pair = _Pair(
        dense=dense,
        own=own,
        dense_anatomy=read_anatomy(dense, pattern),
        own_anatomy=read_anatomy(own, pattern),
        prompts_NC=prompts_NC,
        ceilings=measure_ceilings(nbytes=nbytes, dtype=dense.dtype, device=dense.device),
    )
    timing = Timing(speed=[], samples=[], ceilings=pair.ceilings)
    with _no_collection():
        for cell in _decodable(cells(config), own):
            _time_cell(pair, cell, config, clock, timing)
    return timing


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    dense: PreTrainedModel
    own: PreTrainedModel
    dense_anatomy: Anatomy
    own_anatomy: Anatomy
    prompts_NC: Tensor
    ceilings: Ceilings


def _time_cell(pair: _Pair, cell: Cell, config: BenchConfig, clock: Clock, timing: Timing) -> None:
    """Add the rows and samples of one cell to `timing`; the layers are left as they were."""
    layers = sparse_layers(pair.own)
    before = own_arm(layers)
    try:
        ready = _ready_arms(pair, cell, config, layers)
        calls = {DENSE: cell.prepare(pair.dense, pair.prompts_NC), **{arm.name: arm.prepare for arm in ready}}
        seconds = interleave(
            calls,
            rounds=config.rounds,
            warm_up=config.warm_up_rounds,
            max_seconds=config.max_seconds / len(cells(config)),
            clock=clock,
        )
    finally:
        before.apply(layers)
    timing.samples.extend(_sample_rows(cell, seconds))
    for arm in ready:
        timing.speed.append(
            speed_row(
                cell,
                seconds[DENSE],
                seconds[arm.name],
                dense=pair.dense_anatomy,
                own=pair.own_anatomy,
                loads=arm.loads,
                ceilings=pair.ceilings,
                control=arm.control,
                executor=arm.executor,
            )
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ready:
    """An arm whose outputs are checked: what it is called, what its layers do, and how to time it."""

    control: str
    executor: str
    name: str
    loads: list[Load]
    prepare: Arm


def _ready_arms(pair: _Pair, cell: Cell, config: BenchConfig, layers: list[SparseFFN]) -> list[_Ready]:
    if not layers:
        loads = full_loads(pair.own_anatomy, cell.call)
        prepare = cell.prepare(pair.own, pair.prompts_NC)
        return [_Ready(control="own", executor=DENSE, name="own", loads=loads, prepare=prepare)]
    arms = [own_arm(layers), *(own_arm(layers, name) for name in config.executors)]
    own_L = observe(pair.own, cell.prepare(pair.own, pair.prompts_NC)())
    if not all(layer.static_blocks is not None for layer in layers):
        tokens = cell.call.total_tokens
        arms += [control_arm(layers, control, own_L, tokens) for control in config.controls]
    return [_ready(pair, cell, layers, arm) for arm in arms]


def _ready(pair: _Pair, cell: Cell, layers: list[SparseFFN], arm: OwnArm) -> _Ready:
    arm.apply(layers)
    prepare = cell.prepare(pair.own, pair.prompts_NC)
    uses = observe(pair.own, prepare())
    check_outputs(layers, prepare())

    def applied() -> Callable[[], object]:
        arm.apply(layers)
        return prepare()

    return _Ready(
        control=arm.control,
        executor="+".join(sorted({use.executor for use in uses})),
        name=arm.name,
        loads=[use.load for use in uses],
        prepare=applied,
    )


def _decodable(found: list[Cell], own: PreTrainedModel) -> list[Cell]:
    decodes = all(layer.select.decodes for layer in sparse_layers(own))
    return [cell for cell in found if decodes or cell.phase == "prefill"]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage collection would run inside somebody's sample."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _sample_rows(cell: Cell, seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    place = {"phase": cell.phase, "batch_size": cell.batch_size, "tokens": cell.tokens, "context": cell.context}
    return [
        {**place, "arm": name, "round": number, "ms": 1000 * sample / cell.steps}
        for name, samples in seconds.items()
        for number, sample in enumerate(samples)
    ]


def _refuse_not_causal(model: PreTrainedModel) -> None:
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} has no prefill and decode to time: it is no causal language model. Use bench=none."
        )
