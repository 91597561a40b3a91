"""Routing against nested loops over tokens and blocks."""

import dataclasses

import pytest
import torch
from torch import Tensor

from moesaic.sparse.routing import Routing


def expected_rows(active_TB: Tensor, weight_TB: Tensor) -> list[tuple[int, int, float]]:
    num_tokens, num_blocks = active_TB.shape
    return [(b, t, float(weight_TB[t, b])) for b in range(num_blocks) for t in range(num_tokens) if active_TB[t, b]]


def check(routing: Routing, active_TB: Tensor, weight_TB: Tensor) -> None:
    rows = expected_rows(active_TB, weight_TB)
    got = zip(routing.block_N.tolist(), routing.token_N.tolist(), routing.weight_N.tolist(), strict=True)
    assert list(got) == rows
    assert routing.counts_B.tolist() == [sum(b == row[0] for row in rows) for b in range(active_TB.shape[1])]
    assert routing.count_T().tolist() == [sum(t == row[1] for row in rows) for t in range(active_TB.shape[0])]
    assert routing.counts_B.sum() == routing.block_N.numel()
    assert torch.equal(routing.active_TB(), active_TB)
    assert torch.equal(routing.weight_TB(), weight_TB.where(active_TB, torch.zeros(())))
    assert (routing.num_tokens, routing.num_blocks) == tuple(active_TB.shape)
    assert routing.token_N.dtype == routing.block_N.dtype == routing.counts_B.dtype == torch.int64
    assert routing.weight_N.dtype == torch.float32


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(7, 5), (1, 4), (0, 3), (6, 1)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_from_mask(num_tokens: int, num_blocks: int, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    active_TB = torch.rand(num_tokens, num_blocks, generator=generator) < share
    weight_TB = torch.rand(num_tokens, num_blocks, generator=generator)
    check(Routing.from_mask(active_TB, weight_TB), active_TB, weight_TB)
    check(Routing.from_mask(active_TB), active_TB, torch.ones_like(weight_TB))


@pytest.mark.parametrize(("num_tokens", "num_blocks", "k"), [(7, 5, 2), (1, 4, 4), (3, 4, 0), (0, 4, 2), (0, 4, 0)])
def test_from_topk(num_tokens: int, num_blocks: int, k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight_TB = torch.rand(num_tokens, num_blocks, generator=generator)
    weight_TK, block_TK = weight_TB.topk(k, dim=-1)
    active_TB = torch.zeros(num_tokens, num_blocks, dtype=torch.bool).scatter(1, block_TK, True)
    check(Routing.from_topk(block_TK, weight_TK, num_blocks), active_TB, weight_TB)
    check(Routing.from_topk(block_TK, None, num_blocks), active_TB, torch.ones_like(weight_TB))


@pytest.mark.parametrize("k", [0, 2, 5])
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_from_prefix(k: int, num_tokens: int) -> None:
    active_TB = (torch.arange(5) < k).expand(num_tokens, 5)
    check(Routing.from_prefix(k, num_tokens=num_tokens, num_blocks=5), active_TB, torch.ones(num_tokens, 5))


def test_weights_carry_gradients_through_the_sort() -> None:
    weight_TK = torch.tensor([[0.1, 0.2], [0.3, 0.4]], requires_grad=True)
    routing = Routing.from_topk(torch.tensor([[2, 0], [0, 1]]), weight_TK, 3)
    cost_TB = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (routing.weight_TB() * cost_TB).sum().backward()
    assert weight_TK.grad is not None
    assert weight_TK.grad.tolist() == [[3.0, 1.0], [4.0, 5.0]]


def test_with_weight_keeps_the_assignments_and_casts() -> None:
    routing = Routing.from_topk(torch.tensor([[1], [0]]), None, 2)
    doubled = routing.with_weight(2 * routing.weight_N.bfloat16())
    assert doubled.weight_N.tolist() == [2.0, 2.0]
    assert doubled.weight_N.dtype == torch.float32
    assert doubled.token_N is routing.token_N


def test_a_routing_cannot_be_changed() -> None:
    routing = Routing.from_topk(torch.tensor([[1]]), None, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.num_tokens = 3  # type: ignore[misc]


def test_a_routing_of_all_blocks_holds_every_weight_and_its_gradient() -> None:
    weight_TB = torch.rand(5, 3, requires_grad=True)
    routing = Routing.of_all(weight_TB)
    listed = Routing.from_mask(torch.ones(5, 3, dtype=torch.bool), weight_TB)
    for name in ("token_N", "block_N", "weight_N", "counts_B"):
        torch.testing.assert_close(getattr(routing, name), getattr(listed, name))
    torch.testing.assert_close(routing.weight_TB(), weight_TB)
    # The flat weights and the dense ones are the same numbers, for gradients too.
    factor_TB = torch.rand(5, 3)
    (dense_grad,) = torch.autograd.grad((routing.weight_TB() * factor_TB).sum(), weight_TB)
    flat = (routing.weight_N * factor_TB[routing.token_N, routing.block_N]).sum()
    torch.testing.assert_close(torch.autograd.grad(flat, weight_TB)[0], dense_grad)


def test_dense_weights_kept_from_a_mask_are_the_scattered_ones() -> None:
    active_TB, weight_TB = torch.rand(6, 4) > 0.5, torch.randn(6, 4)
    for routing in (Routing.from_mask(active_TB), Routing.from_mask(active_TB, weight_TB)):
        torch.testing.assert_close(routing.weight_TB(), routing.with_weight(routing.weight_N).weight_TB())
