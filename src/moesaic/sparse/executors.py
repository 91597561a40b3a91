"""Executors: ways of computing the routed sum of block outputs. All agree with `masked`, outputs and gradients.

An executor sees assignments, never how they were chosen. None adds the output bias: that is the layer's part.
Shapes: T tokens, D model dim, B blocks, S neurons per block, N assignments.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.sparse.experts import Experts
from moesaic.sparse.gather import gather
from moesaic.sparse.grouped import GROUPED_DTYPES, grouped, row_multiple
from moesaic.sparse.routing import Routing

__all__ = [
    "AUTO",
    "EXECUTORS",
    "Executor",
    "check_executor",
    "choose_executor",
    "dense",
    "loop",
    "masked",
    "routed_over_dense",
]

Executor = Callable[[Tensor, Experts, Routing], Tensor]
AUTO = "auto"


def masked(x_TD: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """The reference: every block for every token, hidden units times the token's weight for their block."""
    rows = experts.rows()
    h_TF = experts.hidden(x_TD, rows)
    h_TBS = h_TF.unflatten(1, (experts.num_blocks, -1)) * routing.weight_TB()[:, :, None].to(h_TF.dtype)
    return experts.project(h_TBS.flatten(1), rows)


def loop(x_TD: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """One block after the other, each on its own tokens: little memory, and the weights of idle blocks are not read."""
    counts = routing.counts_B.tolist()
    keep_graph = torch.is_grad_enabled()  # with no assignment at all the result must still have a gradient: zeros
    sum_TD, dtype = None, x_TD.dtype
    for rows, token_n, weight_n in zip(
        experts.rows_by_block(), routing.token_N.split(counts), routing.weight_N.split(counts), strict=True
    ):
        if token_n.numel() or keep_graph:
            h_nS = experts.hidden(x_TD.index_select(0, token_n), rows)
            out_nD = experts.project(h_nS * weight_n[:, None].to(h_nS.dtype), rows)
            if sum_TD is None:
                dtype = out_nD.dtype
                wide = torch.promote_types(dtype, torch.float32)
                sum_TD = out_nD.new_zeros(x_TD.shape, dtype=wide)
            sum_TD.index_add_(0, token_n, out_nD.to(sum_TD.dtype))
    return torch.zeros_like(x_TD) if sum_TD is None else sum_TD.to(dtype)


def dense(x_TD: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """All blocks with weight 1, computed as the dense FFN. Raises ValueError for any other routing."""
    wanted = routing.num_tokens * routing.num_blocks
    if routing.token_N.numel() != wanted or not bool((routing.weight_N == 1).all()):
        raise ValueError(
            f"executor=dense runs every block with weight 1, but {routing.token_N.numel()} of {wanted} assignments are "
            "given, or other weights. Use executor=auto, or select AllBlocks."
        )
    rows = experts.rows()
    return experts.project(experts.hidden(x_TD, rows), rows)


EXECUTORS: dict[str, Executor] = {"masked": masked, "loop": loop, "grouped": grouped, "gather": gather, "dense": dense}


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossover:
    """When routed compute beats dense compute for one dtype: see `routed_over_dense`."""

    overhead_rows: int  # moving tokens in and out of a block costs as much as this many of its neurons
    call_macs: float  # calling the products of a block costs as much as this many multiply-adds


# Measured on 2 cores with AVX-512 (bfloat16 in hardware): gated FFNs, D 256 / F 1024 and D 2048 / F 5632, in 4..176
# blocks, a quarter and a half of them active, 1..2048 tokens. Other dtypes use the float32 row.
CROSSOVERS = {
    torch.float32: Crossover(overhead_rows=32, call_macs=1.2e6),
    torch.bfloat16: Crossover(overhead_rows=64, call_macs=16e6),
}
FEW_TOKENS = 8  # up to here reading weights takes longer than multiplying with them
CACHE_BYTES = 8 * 2**20  # sorted copies of the inputs above this fall out of cache, and `loop` overtakes `grouped`
SMALL_FFN_BYTES = 2 * 2**20  # below, all weights are in cache and skipping some saves nothing


def choose_executor(
    num_tokens: int, experts: Experts, grad: bool, *, num_assignments: int, dtype: torch.dtype | None = None
) -> str:
    """The executor that `auto` runs for `num_assignments` (token, block) pairs, from sizes alone; `dtype` is x's.

    Few tokens without gradient: `gather`, if they are likely to leave a quarter of the blocks idle. Else `grouped` or
    `loop` where `routed_over_dense` promises a gain, `masked` (dense compute) where it does not.
    """
    dtype = dtype or experts.up_BSD.dtype
    multiple = row_multiple(dtype)
    groupable = dtype in GROUPED_DTYPES and experts.dim % multiple == 0 and experts.block_size % multiple == 0
    if torch.compiler.is_compiling():  # the number of assignments may not be known yet, and loops do not compile
        return "grouped" if groupable else "masked"
    share = num_assignments / max(1, num_tokens * experts.num_blocks)
    if num_tokens <= FEW_TOKENS and not grad:
        idle_share = (1 - share) ** num_tokens
        if idle_share > 0.25 and 3 * experts.up_BSD.nbytes >= SMALL_FFN_BYTES:
            return "gather"
    if routed_over_dense(num_tokens, experts, share, dtype) > 0.9:
        return "masked"
    cached = num_assignments * experts.dim * dtype.itemsize < CACHE_BYTES
    return "grouped" if groupable and cached else "loop"


def routed_over_dense(num_tokens: int, experts: Experts, share: float, dtype: torch.dtype) -> float:
    """Expected time of `grouped` over that of dense compute, when `share` (0..1) of all pairs is active.

    The active work, which costs more per neuron in small blocks, plus the calls, whatever the number of tokens.
    """
    cost = CROSSOVERS.get(dtype, CROSSOVERS[torch.float32])
    work = share * (1 + cost.overhead_rows / experts.block_size)
    return work + cost.call_macs / (3 * max(1, num_tokens) * experts.block_size * experts.dim)


def check_executor(name: str) -> str:
    """`name` if it is an executor or `auto`. Raises ValueError with the nearest name otherwise."""
    allowed = [*EXECUTORS, AUTO]
    if name not in allowed:
        nearest = difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)[0]
        raise ValueError(f"executor={name!r} is unknown; did you mean {nearest!r}? Allowed: {', '.join(allowed)}.")
    return name
