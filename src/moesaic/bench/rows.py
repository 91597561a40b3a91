"""From samples and counts to what a record says about one timing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesaic.bench.anatomy import Anatomy
from moesaic.bench.calls import Cell
from moesaic.bench.ceilings import Ceilings
from moesaic.bench.cost import Load, call_work, full_loads, ideal_seconds
from moesaic.bench.samples import Times, paired_ratio

__all__ = ["captured_share", "ideal_ratio", "speed_row"]

LEAST_SAVING = 0.01  # below it, a share of the saving would be a share of nothing


def ideal_ratio(dense: Anatomy, own: Anatomy, cell: Cell, loads: Sequence[Load], ceilings: Ceilings) -> float:
    """Time of `own` over time of `dense` if every part of both ran at this machine's ceilings."""
    reference = ideal_seconds(call_work(dense, cell.call, full_loads(dense, cell.call)), ceilings)
    return ideal_seconds(call_work(own, cell.call, loads), ceilings) / reference


def captured_share(ratio: float, ideal: float) -> float | None:
    """How much of the possible saving was had: 1 is all of it, below 0 is slower than dense; None if there is none."""
    return None if 1 - ideal < LEAST_SAVING else (1 - ratio) / (1 - ideal)


def speed_row(
    cell: Cell,
    dense_s: Sequence[float],
    own_s: Sequence[float],
    *,
    dense: Anatomy,
    own: Anatomy,
    loads: Sequence[Load],
    ceilings: Ceilings,
    control: str,
    executor: str,
) -> dict[str, Any]:
    """One entry of a record's `speed`: seconds per call of both arms, taken in turns, and what could have been.

    Times are per call, so per token in a decode. `beats_ideal` marks a ratio whose whole interval is better than the
    ideal, which needs an explanation: most likely a slow dense arm, so its bandwidth and FLOP rate stand beside it.
    """
    dense_ms, own_ms = ([1000 * seconds / cell.steps for seconds in samples] for samples in (dense_s, own_s))
    ratio = paired_ratio(own_s, dense_s)
    ideal = ideal_ratio(dense, own, cell, loads, ceilings)
    parts = list(call_work(dense, cell.call, full_loads(dense, cell.call)))
    dense_times = Times.of(dense_ms)
    blocks = sum(layer.num_blocks for layer in own.ffns)
    return {
        "phase": cell.phase,
        "batch_size": cell.batch_size,
        "tokens": cell.tokens,
        "context": cell.context,
        "control": control,
        "executor": executor,
        "dense_ms": dense_times.plain(),
        "sparse_ms": Times.of(own_ms).plain(),
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "ideal_ratio": ideal,
        "captured_share": captured_share(ratio.median, ideal),
        "beats_ideal": ratio.high < ideal,
        "dense_gb_per_s": sum(part.nbytes for part in parts) / dense_times.median / 1e6,
        "dense_tflop_per_s": sum(part.flops for part in parts) / dense_times.median / 1e9,
        "active_block_frac": sum(load.assignments for load in loads) / cell.call.total_tokens / blocks,
        "union_block_frac": sum(load.union for load in loads) / blocks,
    }
