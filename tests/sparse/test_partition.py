"""Partitions: equal blocks, nothing lost, reproducible, and clear refusals."""

from dataclasses import dataclass

import pytest
import torch
from torch import Generator, Tensor
from toy_ffns import block_outputs, random_ffn, random_inputs

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.experts import Experts
from moesaic.sparse.partition import (
    BalancedKMeans,
    BlocksOfSize,
    CoActivation,
    Contiguous,
    Importance,
    Partition,
    Random,
    check_blocks,
    neuron_rows,
)
from moesaic.sparse.stats import NeuronStats

FFNS = {
    "gated": random_ffn(),
    "plain": random_ffn(gated=False),
    "biased": random_ffn(gated=False, bias=True, activation="gelu"),
}
PARTITIONS = [
    Contiguous(num_blocks=6),
    BlocksOfSize(block_size=4),
    Random(num_blocks=6),
    BalancedKMeans(num_blocks=6),
    BalancedKMeans(num_blocks=6, rows="down"),
    BalancedKMeans(num_blocks=6, solver="exact"),
    CoActivation(num_blocks=6),
    CoActivation(num_blocks=6, counts="clamped"),
    Importance(num_blocks=6),
    Importance(num_blocks=6, criterion="mean_abs_output"),
]


def cut(partition: Partition, ffn: DenseFFN, seed: int = 0) -> Tensor:
    stats = NeuronStats(ffn, random_inputs(40))
    return partition.labels(ffn, stats, generator=Generator().manual_seed(seed))


@pytest.mark.parametrize("ffn", FFNS.values(), ids=FFNS)
@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
def test_equal_blocks_whose_sum_is_the_dense_ffn(partition: Partition, ffn: DenseFFN) -> None:
    block_F = cut(partition, ffn)
    assert block_F.dtype == torch.int64
    assert torch.bincount(block_F).tolist() == [4] * 6
    x_TD = random_inputs(5)
    summed_TD = block_outputs(Experts.from_dense(ffn, block_F), x_TD).sum(1)
    if ffn.down_bias_D is not None:
        summed_TD += ffn.down_bias_D
    torch.testing.assert_close(summed_TD.float(), ffn(x_TD), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
def test_equal_seeds_cut_equally_and_leave_the_global_random_state(partition: Partition) -> None:
    before = torch.get_rng_state()
    first_F = cut(partition, FFNS["gated"])
    assert torch.equal(first_F, cut(partition, FFNS["gated"]))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides_a_random_cut() -> None:
    assert not torch.equal(cut(Random(num_blocks=6), FFNS["gated"], 0), cut(Random(num_blocks=6), FFNS["gated"], 1))


def test_contiguous() -> None:
    assert cut(Contiguous(num_blocks=3), FFNS["gated"]).tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_blocks_of_a_size_are_as_many_as_the_width_gives() -> None:
    assert cut(BlocksOfSize(block_size=1), FFNS["gated"]).tolist() == list(range(24))
    assert BlocksOfSize(block_size=8).for_width(64).num_blocks == 8
    with pytest.raises(ValueError, match=r"partition.block_size=9 does not divide the FFN width 24 .*8, 12\)"):
        BlocksOfSize(block_size=9).check_width(24)
    with pytest.raises(ValueError, match=r"partition.block_size=0 is below 1"):
        BlocksOfSize(block_size=0)


@pytest.mark.parametrize("criterion", ["mean_abs", "mean_abs_output", "mean_abs_input"])
def test_importance_puts_larger_neurons_into_earlier_blocks(criterion: str) -> None:
    ffn, x_TD = FFNS["gated"], random_inputs(40)
    size_F = ffn.hidden(x_TD).abs().mean(0)
    if criterion == "mean_abs_output":
        size_F = size_F * ffn.down_FD.norm(dim=1)
    if criterion == "mean_abs_input":
        size_F = (x_TD @ ffn.gate_FD.T).abs().mean(0)
    block_F = cut(Importance(num_blocks=6, criterion=criterion), ffn)
    for block in range(5):
        assert size_F[block_F == block].min() >= size_F[block_F == block + 1].max()


def test_importance_ties_keep_the_dense_order() -> None:
    ffn = random_ffn(gated=False)
    silent = NeuronStats(ffn, torch.zeros(3, 8))
    assert Importance(num_blocks=2).labels(ffn, silent, generator=Generator()).tolist() == [0] * 12 + [1] * 12


@pytest.mark.parametrize("solver", ["exact", "fast"])
@pytest.mark.parametrize("rows", ["gate", "up", "down"])
def test_kmeans_recovers_planted_blocks_of_the_chosen_matrix(rows: str, solver: str) -> None:
    planted_F = torch.arange(24) % 4
    centre_BD = 3 * torch.eye(4, 8)
    noise_FD = 0.05 * torch.randn(24, 8, generator=Generator().manual_seed(5))
    # Rows differ in length: only their direction may count.
    length_F1 = torch.linspace(0.2, 5.0, 24)[:, None]
    matrices = {
        f"{name}_FD": torch.randn(24, 8, generator=Generator().manual_seed(6)) for name in ("gate", "up", "down")
    }
    matrices[f"{rows}_FD"] = (centre_BD[planted_F] + noise_FD) * length_F1
    found_F = cut(BalancedKMeans(num_blocks=4, rows=rows, solver=solver), DenseFFN(**matrices, activation="silu"))
    assert len({(a, b) for a, b in zip(planted_F.tolist(), found_F.tolist(), strict=True)}) == 4


def test_auto_rows_are_the_gate_where_there_is_one() -> None:
    assert neuron_rows(FFNS["gated"], "auto") is FFNS["gated"].gate_FD
    assert neuron_rows(FFNS["plain"], "auto") is FFNS["plain"].up_FD
    with pytest.raises(ValueError, match="no gate matrix"):
        neuron_rows(FFNS["plain"], "gate")


@pytest.mark.parametrize(
    ("num_blocks", "message"),
    [(7, "does not divide the FFN width 24.*6, 8"), (48, "exceeds the FFN width 24.*: 24\\)"), (13, "12, 24")],
)
def test_a_width_that_does_not_fit_is_refused_with_the_nearest_that_do(num_blocks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_blocks(24, num_blocks)
    with pytest.raises(ValueError, match=message):
        Contiguous(num_blocks=num_blocks).labels(FFNS["gated"], None, generator=Generator())


@pytest.mark.parametrize("num_blocks", [0, -2])
def test_no_blocks_at_all_are_refused_on_construction(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="below 1"):
        Random(num_blocks=num_blocks)


@pytest.mark.parametrize("partition", [CoActivation(num_blocks=6), Importance(num_blocks=6)], ids=repr)
def test_missing_calibration_is_said(partition: Partition) -> None:
    with pytest.raises(ValueError, match="needs calibration inputs: set calibration_tokens"):
        partition.labels(FFNS["gated"], None, generator=Generator())


@dataclass(frozen=True, kw_only=True, slots=True)
class Lopsided(Partition):
    """A partition from another package that breaks the rule."""

    def cut(self, ffn: DenseFFN, stats: NeuronStats | None, *, generator: Generator) -> Tensor:
        return torch.arange(ffn.width).clamp(max=self.num_blocks - 1)


def test_an_unbalanced_cut_from_outside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Lopsided.cut labelled 24 of 24 neurons in blocks of \[1, 1, 22\].*needs 8"):
        Lopsided(num_blocks=3).labels(FFNS["gated"], None, generator=Generator())


@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
def test_half_precision_weights(partition: Partition) -> None:
    ffn = FFNS["gated"]
    half = DenseFFN(
        gate_FD=ffn.gate_FD.bfloat16(), up_FD=ffn.up_FD.bfloat16(), down_FD=ffn.down_FD.bfloat16(), activation="silu"
    )
    assert torch.bincount(cut(partition, half)).tolist() == [4] * 6
