"""What each width of an FFN costs in time: dense slices of one FFN after the other, timed in turns with the full width.

The table is what `method.phases.joint.cost.latency_table` reads. Weights are random: they decide nothing about time.
Shapes: T tokens, D model dim, F FFN width, X widths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from moesaic.bench.ceilings import synchronise
from moesaic.bench.samples import Arm, Clock, interleave, paired_ratio
from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.level_cost import LatencyTable

__all__ = ["measure_levels"]


@torch.inference_mode()
def measure_levels(
    *,
    dim: int,
    width: int,
    num_blocks: int,
    blocks_X: Sequence[int],
    num_layers: int,
    tokens: int,
    activation: str = "silu",
    gated: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rounds: int = 50,
    clock: Clock = time.perf_counter,
) -> LatencyTable:
    """Median milliseconds of one FFN at each of `blocks_X` of its `num_blocks` blocks, for `tokens` tokens at once.

    A sample is a pass over `num_layers` FFNs with weights of their own, as in a model, so that weights are as cold as
    they are there. Each width's time is the full width's, times the median of the ratios to it round by round.
    Raises ValueError where blocks do not divide the width, or the full width is not among `blocks_X`.
    """
    if width % num_blocks or not all(1 <= blocks <= num_blocks for blocks in blocks_X) or num_blocks not in blocks_X:
        raise ValueError(
            f"blocks_X={list(blocks_X)} must lie within 1..num_blocks={num_blocks}, the last included, which must "
            f"divide width={width}"
        )
    device = torch.device(device)
    ffns = [random_ffn(dim, width, activation, gated=gated, dtype=dtype, device=device) for _ in range(num_layers)]
    x_TD = torch.randn(tokens, dim, dtype=dtype, device=device)
    arms = {str(blocks): one_pass(ffns, x_TD, width // num_blocks * blocks) for blocks in blocks_X}
    seconds = interleave(arms, rounds=rounds, warm_up=3, clock=clock)
    full = seconds[str(num_blocks)]
    full_ms = 1000 * median(full) / num_layers
    return LatencyTable(
        blocks_X=tuple(blocks_X),
        ms_X=tuple(full_ms * paired_ratio(seconds[str(blocks)], full).median for blocks in blocks_X),
        num_blocks=num_blocks,
        dim=dim,
        width=width,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        device=device.type,
    )


def one_pass(ffns: Sequence[DenseFFN], x_TD: Tensor, width: int) -> Arm:
    """An arm of `interleave`: each FFN once, cut to its first `width` neurons."""
    slices = [sliced(ffn, width) for ffn in ffns]

    def call() -> None:
        for ffn in slices:
            ffn(x_TD)
        synchronise(x_TD.device)

    def prepare() -> Callable[[], object]:
        synchronise(x_TD.device)
        return call

    return prepare


def random_ffn(
    dim: int, width: int, activation: str, *, gated: bool, dtype: torch.dtype, device: torch.device
) -> DenseFFN:
    """An FFN without biases and with random weights."""
    gate_FD, up_FD, down_FD = (torch.randn(width, dim, dtype=dtype, device=device) * dim**-0.5 for _ in range(3))
    return DenseFFN(gate_FD=gate_FD if gated else None, up_FD=up_FD, down_FD=down_FD, activation=activation)


def sliced(ffn: DenseFFN, width: int) -> DenseFFN:
    """The first `width` neurons, as views: what a sparse layer runs at a static width."""
    gate_FD = None if ffn.gate_FD is None else ffn.gate_FD[:width]
    return DenseFFN(gate_FD=gate_FD, up_FD=ffn.up_FD[:width], down_FD=ffn.down_FD[:width], activation=ffn.activation)
