"""The cost model against layers and models counted by hand, and against torch's own FLOP counter."""

import math
from dataclasses import replace

import pytest

from moesaic.bench.anatomy import Anatomy, Attention, FFNLayer, Matrix
from moesaic.bench.calls import Cell
from moesaic.bench.ceilings import Ceilings
from moesaic.bench.cost import Call, Load, active_parameters, call_work, cost_record, full_loads, ideal_seconds
from moesaic.bench.rows import captured_share, ideal_ratio, speed_row

# D 4, F 8 in 4 blocks of 2 neurons, gated: a block has 3 * 2 * 4 = 24 weights, the router 4 * 4 = 16; 2 bytes each.
SPARSE_FFN = FFNLayer(
    num_blocks=4,
    block=Matrix(parameters=24, nbytes=48),
    block_flops=48,
    router=Matrix(parameters=16, nbytes=32),
    router_flops=32,
)
DENSE_FFN = FFNLayer(
    num_blocks=1,
    block=Matrix(parameters=96, nbytes=192),
    block_flops=192,
    router=Matrix(parameters=0, nbytes=0),
    router_flops=0,
)
REST = {
    "body": Matrix(parameters=64, nbytes=128),
    "head": Matrix(parameters=40, nbytes=80),
    "attention": Attention(layers=1, width=4, cache_bytes=16),
}
DENSE = Anatomy(ffns=(DENSE_FFN,), parameters_total=300, **REST)
SPARSE = Anatomy(ffns=(SPARSE_FFN,), parameters_total=316, **REST)
CEILINGS = Ceilings(
    copy_bytes_per_s=100.0, matmul_flops_per_s=1000.0, copy_nbytes=1, dtype="float32", threads=1, device="cpu"
)


def test_parts_of_a_decode_step_by_hand() -> None:
    call = Call(batch_size=2, tokens=1, context=9)
    parts = list(call_work(SPARSE, call, [Load(assignments=4, union=3)]))
    assert [(part.flops, part.nbytes) for part in parts] == [
        (4 * 48, 3 * 48),  # blocks
        (2 * 32, 32),  # router
        (2 * 64 * 2, 128),  # body
        (2 * 40 * 2, 80),  # head
        (4 * 4 * 2 * 10, 16 * 2 * 10),  # attention: 10 keys for each of 2 queries; 10 cached tokens of 2 sequences
    ]


def test_parts_of_a_prefill_by_hand() -> None:
    call = Call(batch_size=2, tokens=3, context=0)
    blocks, router, body, head, attention = call_work(SPARSE, call, full_loads(SPARSE, call))
    assert (blocks.flops, blocks.nbytes) == (6 * 4 * 48, 4 * 48)
    assert router.flops == 6 * 32
    assert body.flops == 2 * 64 * 6
    assert head.flops == 2 * 40 * 2  # the last token of each sequence only
    assert attention.flops == 4 * 4 * 2 * (1 + 2 + 3)


def test_each_part_is_bound_by_what_it_needs_longer_for() -> None:
    call = Call(batch_size=1, tokens=1, context=0)
    parts = list(call_work(DENSE, call, full_loads(DENSE, call)))
    by_hand = [max(192 / 100, 192 / 1000), 0.0, max(128 / 100, 0.128), max(80 / 100, 0.08), max(0.16, 0.016)]
    assert ideal_seconds(iter(parts), CEILINGS) == pytest.approx(sum(by_hand))


def test_the_ideal_ratio_grows_with_the_union_of_blocks() -> None:
    cell = Cell(phase="decode", batch_size=4, tokens=8, context=16, steps=8)
    ratios = [ideal_ratio(DENSE, SPARSE, cell, [Load(assignments=4, union=union)], CEILINGS) for union in (1, 2, 4)]
    assert ratios == sorted(ratios)
    assert ratios[0] < 1 < ratios[2]  # with all blocks touched the router comes on top


def test_a_dense_model_against_itself_is_one() -> None:
    cell = Cell(phase="prefill", batch_size=1, tokens=8, context=0, steps=1)
    assert ideal_ratio(DENSE, DENSE, cell, full_loads(DENSE, cell.call), CEILINGS) == 1


def test_captured_share() -> None:
    assert captured_share(0.5, 0.5) == 1
    assert captured_share(0.75, 0.5) == 0.5
    assert captured_share(1.5, 0.5) == -1
    assert captured_share(1.0, 1.0) is None
    assert captured_share(1.0, 1.2) is None


def test_cost_record_by_hand() -> None:
    record = cost_record(DENSE, SPARSE, blocks_L=[1.5], context=9)
    rest = 2 * (64 + 40) + 4 * 4 * 10
    assert record == {
        "parameters_total": 316,
        "parameters_active": 316 - 2.5 * 24,
        "active_ffn_frac": 3 / 8,
        "ffn_flops_per_token": 1.5 * 48,
        "router_flops_per_token": 32,
        "model_flops_per_token": 1.5 * 48 + 32 + rest,
        "dense_ffn_flops_per_token": 192,
        "dense_model_flops_per_token": 192 + rest,
        "ffn_bytes_per_token": 1.5 * 48,
        "router_bytes_per_token": 32,
        "model_bytes_per_token": 1.5 * 48 + 32 + 128 + 80 + 16 * 10,
        "dense_ffn_bytes_per_token": 192,
        "dense_model_bytes_per_token": 192 + 128 + 80 + 16 * 10,
        "attention_context_tokens": 9,
    }


def test_a_narrower_dense_model_is_partly_active() -> None:
    slice_ = replace(DENSE_FFN, block=Matrix(parameters=24, nbytes=48), block_flops=48)
    record = cost_record(DENSE, Anatomy(ffns=(slice_,), parameters_total=228, **REST))
    assert (record["active_ffn_frac"], record["parameters_active"]) == (0.25, 228)


def test_a_gate_that_every_token_multiplies_is_read_once_whatever_the_blocks() -> None:
    block = Matrix(parameters=16, nbytes=32)  # up and down rows
    gate = Matrix(parameters=32, nbytes=64)
    ffn = replace(SPARSE_FFN, block=block, block_flops=32, always=gate, always_flops=64)
    own = replace(SPARSE, ffns=(ffn,))
    blocks, *_ = call_work(own, Call(batch_size=2, tokens=3, context=0), [Load(assignments=5, union=3)])
    assert (blocks.flops, blocks.nbytes) == (6 * 64 + 5 * 32, 64 + 3 * 32)
    record = cost_record(DENSE, own, blocks_L=[2])
    assert record["active_ffn_frac"] == pytest.approx(1 / 3 + 2 / 3 * 2 / 4)
    assert record["parameters_active"] == 316 - 2 * 16
    assert cost_record(DENSE, own)["ffn_bytes_per_token"] == 192


def test_a_wrong_number_of_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks_L has 2 entries, but the model has 1"):
        active_parameters(SPARSE, [1.0, 1.0])


def test_speed_row_of_a_decode() -> None:
    cell = Cell(phase="decode", batch_size=1, tokens=4, context=10, steps=4)
    loads = [Load(assignments=1, union=1)]
    row = speed_row(
        cell,
        [8.0, 16.0, 8.0],
        [4.0, 8.0, 4.0],
        dense=DENSE,
        own=SPARSE,
        loads=loads,
        ceilings=CEILINGS,
        control="own",
        executor="gather",
    )
    assert row["dense_ms"] == {"median": 2000.0, "p10": 2000.0, "p90": pytest.approx(3600.0), "n": 3}
    assert row["sparse_ms"]["median"] == 1000.0
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (0.5, 0.5, 0.5)
    assert row["captured_share"] == pytest.approx(0.5 / (1 - row["ideal_ratio"]))
    assert row["beats_ideal"] == (row["ideal_ratio"] > 0.5)
    # 4 steps: the middle one has 11 tokens before it. 192 + 128 + 80 + 16 * 12 bytes in 2 s.
    assert row["dense_gb_per_s"] == pytest.approx((192 + 128 + 80 + 16 * 12) / 2 / 1e9)
    assert row["dense_tflop_per_s"] == pytest.approx((192 + 128 + 80 + 4 * 4 * 12) / 2 / 1e12)
    assert (row["active_block_frac"], row["union_block_frac"]) == (0.25, 0.25)
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
