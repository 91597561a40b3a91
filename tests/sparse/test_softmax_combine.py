"""Softmax weights: their sizes, the start at exactly 1, and the gradient that gamma gets there."""

import pytest
import torch
from toy_ffns import random_experts, random_ffn, random_inputs

from moesaic.sparse.grap import Grap
from moesaic.sparse.layer import SparseFFN
from moesaic.sparse.select import AllBlocks, TopK
from moesaic.sparse.softmax_combine import SoftmaxCombine

SCALED = SoftmaxCombine(scale="total", gamma=0.0, learn_gamma=True)


def scores(blocks=4):
    return torch.randn(20, blocks, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 5, 6, 8, 11, 16, 32, 64, 128])
def test_scaled_weights_start_at_exactly_one(num_blocks):
    score_TB = scores(num_blocks)
    routing = SCALED.build(8, num_blocks)(TopK(k=2)(score_TB), score_TB)
    assert (routing.weight_N == 1).all()


def test_a_converted_layer_is_dense_and_gamma_has_a_gradient_at_zero():
    experts = random_experts(random_ffn(dim=8, width=32), 4)
    combine = SCALED.build(8, 4)
    sparse = SparseFFN(experts, Grap().build(8, 4), AllBlocks(), combine)
    x_TD = random_inputs(20)
    y_TD = sparse(x_TD)
    torch.testing.assert_close(y_TD, experts.dense_ffn()(x_TD))
    y_TD.square().sum().backward()
    assert combine.gamma.grad.abs() > 1e-3
    assert list(combine.parameters()) == [combine.gamma]


def test_weights_are_probabilities_over_all_blocks():
    score_TB = scores()
    for rule in (TopK(k=2), AllBlocks()):
        routing = SoftmaxCombine(gamma=3.0).build(8, 4)(rule(score_TB), score_TB)
        prob_TB = (3.0 * score_TB).softmax(1)
        torch.testing.assert_close(routing.weight_N, prob_TB[routing.token_N, routing.block_N])


def test_weights_over_the_selected_blocks_sum_to_one():
    score_TB = scores()
    routing = SoftmaxCombine(weight="renormalised").build(8, 4)(TopK(k=2)(score_TB), score_TB)
    expected_TK = score_TB.topk(2, dim=1).values.softmax(1)
    torch.testing.assert_close(routing.weight_TB().topk(2, dim=1).values, expected_TK)


def test_the_scale_can_reach_the_number_of_blocks():
    combine = SCALED.build(8, 4)
    with torch.no_grad():
        combine.gamma.fill_(1e4)
    score_TB = scores()
    weight_N = combine(TopK(k=1)(score_TB), score_TB).weight_N
    assert weight_N.max().item() == pytest.approx(4)


def test_a_fixed_gamma_is_no_parameter():
    assert not SoftmaxCombine().build(8, 4).state_dict()


def test_weight_one_is_refused():
    with pytest.raises(ValueError, match=r"combine.weight=one has no softmax. Use moesaic.sparse.combine.Combine"):
        SoftmaxCombine(weight="one")
