"""Experts: neurons in their blocks, in every layout that families have."""

import pytest
import torch
from torch import Tensor

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.experts import Experts, ExpertsShape, block_order

NUM_NEURONS, DIM = 12, 5


def random_ffn(*, gated: bool, biased: bool, activation: str = "silu") -> DenseFFN:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return DenseFFN(
        gate_FD=draw(NUM_NEURONS, DIM) if gated else None,
        up_FD=draw(NUM_NEURONS, DIM),
        down_FD=draw(NUM_NEURONS, DIM),
        gate_bias_F=draw(NUM_NEURONS) if gated and biased else None,
        up_bias_F=draw(NUM_NEURONS) if biased else None,
        down_bias_D=draw(DIM) if biased else None,
        activation=activation,
        dropout=0.1,
    )


def random_blocks(num_blocks: int) -> Tensor:
    return torch.randperm(NUM_NEURONS, generator=torch.Generator().manual_seed(1)) % num_blocks


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 3, 4, 12])
def test_every_neuron_lands_in_its_block(gated: bool, biased: bool, num_blocks: int) -> None:
    ffn, block_F = random_ffn(gated=gated, biased=biased), random_blocks(num_blocks)
    experts = Experts.from_dense(ffn, block_F)
    size = NUM_NEURONS // num_blocks
    assert (experts.num_blocks, experts.block_size, experts.dim, experts.gated) == (num_blocks, size, DIM, gated)
    assert sorted(experts.neuron_F.tolist()) == list(range(NUM_NEURONS))
    for b in range(num_blocks):
        for s in range(size):
            neuron = int(experts.neuron_F[b * size + s])
            assert block_F[neuron] == b
            for name in ("gate", "up", "down"):
                rows_F, rows_BS = getattr(ffn, f"{name}_FD"), getattr(experts, f"{name}_BSD")
                assert (rows_F is None) == (rows_BS is None)
                assert rows_F is None or torch.equal(rows_BS[b, s], rows_F[neuron])
            for name in ("gate", "up"):
                bias_F, bias_BS = getattr(ffn, f"{name}_bias_F"), getattr(experts, f"{name}_bias_BS")
                assert (bias_F is None) == (bias_BS is None)
                assert bias_F is None or bias_BS[b, s] == bias_F[neuron]
    assert torch.equal(experts.block_of_neuron(), block_F)


@pytest.mark.parametrize("gated", [True, False])
def test_all_rows_give_the_dense_output(gated: bool) -> None:
    ffn = random_ffn(gated=gated, biased=True)
    experts = Experts.from_dense(ffn, random_blocks(4))
    x_TD = torch.randn(3, DIM, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(experts.dense_ffn()(x_TD), ffn(x_TD))
    assert experts.dense_ffn().dropout == ffn.dropout


def test_views_share_memory_with_the_parameters_and_copies_do_not() -> None:
    experts = Experts.from_dense(random_ffn(gated=True, biased=True), random_blocks(4))
    for rows in (experts.rows(), experts.rows(2, 4), experts.dense_ffn(), *experts.rows_by_block()):
        up = rows.up_FD if isinstance(rows, DenseFFN) else rows.up_RD
        assert up.untyped_storage().data_ptr() == experts.up_BSD.untyped_storage().data_ptr()
    copied = experts.copy_rows(torch.tensor([3, 1]))
    assert torch.equal(copied.up_RD, torch.cat([experts.up_BSD[3], experts.up_BSD[1]]))
    assert copied.up_RD.untyped_storage().data_ptr() != experts.up_BSD.untyped_storage().data_ptr()


def test_the_weights_are_copies_of_the_dense_ones() -> None:
    ffn = random_ffn(gated=True, biased=True)
    experts = Experts.from_dense(ffn, torch.arange(NUM_NEURONS) // 3)
    before = experts.up_BSD.detach().clone()
    ffn.up_FD.zero_()
    assert torch.equal(experts.up_BSD, before)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_an_empty_shell_takes_the_state_of_the_same_shape(gated: bool, biased: bool) -> None:
    experts = Experts.from_dense(random_ffn(gated=gated, biased=biased), random_blocks(3))
    shell = Experts(experts.shape)
    assert shell.shape == experts.shape
    shell.load_state_dict(experts.state_dict())
    for name, tensor in experts.state_dict().items():
        assert torch.equal(shell.state_dict()[name], tensor), name


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        ffn = DenseFFN(gate_FD=None, up_FD=torch.empty(12, 5), down_FD=torch.empty(12, 5), activation="relu")
    experts = Experts.from_dense(ffn, random_blocks(4))
    assert all(tensor.is_meta for tensor in experts.state_dict().values())


def test_block_order_sorts_by_block_then_neuron() -> None:
    neuron_F, num_blocks = block_order(torch.tensor([1, 0, 1, 0]))
    assert (neuron_F.tolist(), num_blocks) == ([1, 3, 0, 2], 2)


def test_bad_labels_are_refused() -> None:
    ffn = random_ffn(gated=False, biased=False)
    with pytest.raises(ValueError, match=r"blocks of \[5, 7\] neurons"):
        Experts.from_dense(ffn, torch.tensor([0] * 5 + [1] * 7))
    with pytest.raises(ValueError, match=r"blocks of \[0, 6\] neurons"):
        Experts.from_dense(ffn, torch.tensor([0] * 6 + [2] * 6))
    with pytest.raises(ValueError, match="labels 3 neurons, but the FFN has 12"):
        Experts.from_dense(ffn, torch.zeros(3, dtype=torch.int64))


def test_a_bad_shape_is_refused() -> None:
    good = {"num_blocks": 2, "block_size": 3, "dim": 4, "activation": "relu", "gated": False}
    ExpertsShape(**good)
    with pytest.raises(ValueError, match="block_size=0"):
        ExpertsShape(**{**good, "block_size": 0})
    with pytest.raises(ValueError, match="reluu"):
        ExpertsShape(**{**good, "activation": "reluu"})
    with pytest.raises(ValueError, match="gate_bias"):
        ExpertsShape(**{**good, "gate_bias": True})
