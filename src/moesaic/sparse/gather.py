"""The `gather` executor, for few tokens: the weights of blocks that no token wants are not read.

Shapes: T tokens, D model dim, B blocks, S neurons per block, U blocks computed together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.sparse.experts import BlockRows, Experts
from moesaic.sparse.routing import Routing

__all__ = ["gather", "merge_adjacent"]

# Measured with D 2048, F 5632, one token, 2 cores, float32 and bfloat16. A product of fewer bytes than _SLICE_BYTES
# costs more in its call than in its reading; copies of _CHUNK_BYTES stay in cache and need no fresh pages.
_SLICE_BYTES = 2**20
_CHUNK_BYTES = 2**20
_FEW_RUNS = 2
_DENSE_SHARE = 0.8


def gather(x_TD: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """Weighted sum (T, D) of the routed blocks' outputs, without the output bias.

    Each active block is computed for all T tokens, with weight 0 where it was not chosen. A run of adjacent active
    blocks is one slice of the weights, not copied, if it is long; many short runs are copied together, a cache-sized
    chunk at a time. Where nearly all blocks are active, all are read in one slice.
    """
    weight_TB = routing.weight_TB()
    parts = [
        _weighted_sum(x_TD, experts, rows, weight_TB[:, block_U])
        for block_U, rows in _parts(experts, routing.counts_B.tolist())
    ]
    sum_TD = parts[0]
    if len(parts) > 1:
        wide = torch.promote_types(sum_TD.dtype, torch.float32)
        sum_TD = torch.stack(parts).sum(0, dtype=wide).to(sum_TD.dtype)
    return sum_TD


def merge_adjacent(block_U: list[int]) -> list[tuple[int, int]]:
    """Sorted block numbers as half-open ranges: [0, 1, 2, 5] gives [(0, 3), (5, 6)]."""
    ranges: list[tuple[int, int]] = []
    for block in block_U:
        if ranges and ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], block + 1)
        else:
            ranges.append((block, block + 1))
    return ranges


def _weighted_sum(x_TD: Tensor, experts: Experts, rows: BlockRows, weight_TU: Tensor) -> Tensor:
    h_TR = experts.hidden(x_TD, rows)
    h_TUS = h_TR.unflatten(1, (weight_TU.shape[1], experts.block_size)) * weight_TU[:, :, None].to(h_TR.dtype)
    return experts.project(h_TUS.flatten(1), rows)


def _parts(experts: Experts, counts: list[int]) -> Iterator[tuple[slice | Tensor, BlockRows]]:
    active = [block for block, count in enumerate(counts) if count]
    if len(active) >= _DENSE_SHARE * len(counts):
        active = list(range(len(counts)))
    runs = merge_adjacent(active) or [(0, 0)]  # no block at all still needs a result, and its gradient
    block_bytes = experts.up_BSD[0].nbytes
    short = [run for run in runs if (run[1] - run[0]) * block_bytes < _SLICE_BYTES]
    if len(short) <= _FEW_RUNS:
        short = []
    for start, stop in runs:
        if (start, stop) not in short:
            yield slice(start, stop), experts.rows(start, stop)
    if short:
        block_U = torch.tensor([block for run in short for block in range(*run)], device=experts.up_BSD.device)
        for chunk_U in block_U.split(max(1, _CHUNK_BYTES // block_bytes)):
            yield chunk_U, experts.copy_rows(chunk_U)
