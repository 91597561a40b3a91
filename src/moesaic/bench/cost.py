"""The cost model: parameters, FLOPs and bytes of a model, and the time ratio that this machine's ceilings allow.

A FLOP is a multiplication or an addition inside a matrix product; norms, activations and softmax are not counted.
Bytes are weights (each matrix once per call) and the KV cache; activations are not counted.
Shapes: L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moesaic.bench.anatomy import Anatomy, FFNLayer, Matrix
from moesaic.bench.ceilings import Ceilings

__all__ = [
    "Call",
    "Load",
    "Phase",
    "Work",
    "active_parameters",
    "call_work",
    "cost_record",
    "full_loads",
    "ideal_seconds",
]

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one part of a call multiplies and reads."""

    flops: float
    nbytes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one FFN layer has to do in one call: (token, block) `assignments`, and the different blocks they touch."""

    assignments: float
    union: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One forward call: `batch_size` sequences, each `tokens` new tokens after `context` cached ones.

    A prefill has context 0, a decode step has tokens 1. Logits are computed for the last token only.
    """

    batch_size: int
    tokens: int
    context: int

    @property
    def total_tokens(self) -> int:
        """New tokens of all sequences."""
        return self.batch_size * self.tokens

    @property
    def attended(self) -> int:
        """(query, key) pairs of a causal attention head."""
        return self.batch_size * (self.tokens * self.context + self.tokens * (self.tokens + 1) // 2)


def full_loads(anatomy: Anatomy, call: Call) -> list[Load]:
    """Every block runs for every token: what a dense layer does."""
    return [Load(assignments=call.total_tokens * layer.num_blocks, union=layer.num_blocks) for layer in anatomy.ffns]


def ffn_work(layer: FFNLayer, load: Load, tokens: int) -> Work:
    """The blocks of one FFN, and what of it all tokens multiply."""
    return Work(
        flops=tokens * layer.always_flops + load.assignments * layer.block_flops,
        nbytes=layer.always.nbytes + load.union * layer.block.nbytes,
    )


def router_work(layer: FFNLayer, tokens: int) -> Work:
    """The router of one FFN."""
    return Work(flops=tokens * layer.router_flops, nbytes=layer.router.nbytes)


def rest_work(anatomy: Anatomy, call: Call) -> Iterator[Work]:
    """Everything but FFNs and routers: the other matrices, the output matrix, the attention products."""
    yield _matrix_work(anatomy.body, call.total_tokens)
    yield _matrix_work(anatomy.head, call.batch_size)
    attention = anatomy.attention
    cached = call.batch_size * (call.context + call.tokens)
    yield Work(
        flops=4 * attention.layers * attention.width * call.attended,
        nbytes=attention.layers * attention.cache_bytes * cached,
    )


def call_work(anatomy: Anatomy, call: Call, loads: Sequence[Load]) -> Iterator[Work]:
    """The parts of one call, each of which is bound by either its FLOPs or its bytes."""
    for layer, load in zip(anatomy.ffns, loads, strict=True):
        yield ffn_work(layer, load, call.total_tokens)
        yield router_work(layer, call.total_tokens)
    yield from rest_work(anatomy, call)


def ideal_seconds(parts: Iterable[Work], ceilings: Ceilings) -> float:
    """The time of a call whose every part runs at the machine's copy bandwidth or matmul rate, whichever binds."""
    return sum(max(part.nbytes / ceilings.copy_bytes_per_s, part.flops / ceilings.matmul_flops_per_s) for part in parts)


def active_parameters(anatomy: Anatomy, blocks_L: Sequence[float]) -> float:
    """Parameters that one token uses when it runs `blocks_L` blocks (a mean) of each FFN; routers count in full."""
    idle = (layer.block.parameters * (layer.num_blocks - blocks) for layer, blocks in _zip(anatomy, blocks_L))
    return anatomy.parameters_total - sum(idle)


def cost_record(
    dense: Anatomy, own: Anatomy, *, blocks_L: Sequence[float] | None = None, context: int = 0
) -> dict[str, Any]:
    """The `cost` part of a record: parameters, and what one token that has `context` tokens before it costs.

    FLOPs and bytes are those of decoding the token alone, its logits included. `blocks_L` is the mean number of blocks
    that a token runs in each of `own`'s FFNs (None: all of them). `active_ffn_frac` is the FFNs' share of the dense
    model's FFN FLOPs, routers left out: where whole neurons are skipped, the share of neurons.
    """
    blocks = [float(layer.num_blocks) for layer in own.ffns] if blocks_L is None else [float(b) for b in blocks_L]
    call = Call(batch_size=1, tokens=1, context=context)
    ffn = _sum(ffn_work(layer, Load(assignments=count, union=count), 1) for layer, count in _zip(own, blocks))
    router = _sum(router_work(layer, 1) for layer in own.ffns)
    rest = _sum(rest_work(own, call))
    dense_ffn = _sum(ffn_work(*pair, 1) for pair in zip(dense.ffns, full_loads(dense, call), strict=True))
    dense_rest = _sum(rest_work(dense, call))
    return {
        "parameters_total": own.parameters_total,
        "parameters_active": active_parameters(own, blocks),
        "active_ffn_frac": ffn.flops / dense_ffn.flops,
        "ffn_flops_per_token": ffn.flops,
        "router_flops_per_token": router.flops,
        "model_flops_per_token": ffn.flops + router.flops + rest.flops,
        "dense_ffn_flops_per_token": dense_ffn.flops,
        "dense_model_flops_per_token": dense_ffn.flops + dense_rest.flops,
        "ffn_bytes_per_token": ffn.nbytes,
        "router_bytes_per_token": router.nbytes,
        "model_bytes_per_token": ffn.nbytes + router.nbytes + rest.nbytes,
        "dense_ffn_bytes_per_token": dense_ffn.nbytes,
        "dense_model_bytes_per_token": dense_ffn.nbytes + dense_rest.nbytes,
        "attention_context_tokens": context,
    }


def _sum(parts: Iterable[Work]) -> Work:
    listed = list(parts)
    return Work(flops=sum(part.flops for part in listed), nbytes=sum(part.nbytes for part in listed))


def _matrix_work(matrix: Matrix, tokens: int) -> Work:
    return Work(flops=2 * matrix.parameters * tokens, nbytes=matrix.nbytes)


def _zip(anatomy: Anatomy, blocks_L: Sequence[float]) -> Iterator[tuple[FFNLayer, float]]:
    if len(blocks_L) != len(anatomy.ffns):
        raise ValueError(f"blocks_L has {len(blocks_L)} entries, but the model has {len(anatomy.ffns)} FFNs.")
    return zip(anatomy.ffns, blocks_L, strict=True)
