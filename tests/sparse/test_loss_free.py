"""Loss-free balance: the bias moves by exactly its step, evens loads out, and never reaches a weight."""

import pytest
import torch
from toy_ffns import random_experts, random_ffn, random_inputs

from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import SparseFFN
from moesaic.sparse.loss_free import LossFreeTopK
from moesaic.sparse.score import Linear
from moesaic.sparse.select import TopK

DIM, NUM_BLOCKS = 8, 4


def layer(rule):
    experts = random_experts(random_ffn(dim=DIM, width=32), NUM_BLOCKS)
    score = Linear(activation="sigmoid").build(DIM, NUM_BLOCKS)
    score.initialise(experts, None, generator=torch.Generator().manual_seed(1))
    return SparseFFN(experts, score, rule, Combine(weight="score").build(DIM, NUM_BLOCKS))


@pytest.mark.parametrize(("cosine", "step"), [(False, 0.001), (True, 0.001 * DIM**-0.5)])
def test_the_bias_moves_by_exactly_one_step_and_only_in_training(cosine, step):
    sparse, x_TD = layer(LossFreeTopK(k=1, cosine=cosine)), random_inputs(64)
    routing, _ = sparse.eval().route(x_TD)
    assert (sparse.select_state.bias_B == 0).all()
    sparse.train().route(x_TD)
    load_B = routing.counts_B.float()
    expected_B = step * (load_B.mean() - load_B).sign()
    assert expected_B.abs().sum() > 0
    assert torch.equal(sparse.select_state.bias_B, expected_B)


def test_the_bias_is_saved_has_no_gradient_and_is_not_trained():
    sparse = layer(LossFreeTopK(k=1)).train()
    sparse(random_inputs(64)).sum().backward()
    assert "select_state.bias_B" in sparse.state_dict()
    assert not sparse.select_state.bias_B.requires_grad
    assert "select_state.bias_B" not in dict(sparse.named_parameters())


def test_weights_are_scores_without_the_bias():
    sparse, x_TD = layer(LossFreeTopK(k=2)).eval(), random_inputs(64)
    sparse.select_state.bias_B.copy_(torch.tensor([5.0, 0.0, 0.0, -5.0]))
    routing, score_TB = sparse.route(x_TD)
    assert routing.counts_B[0] == 64
    assert routing.counts_B[3] == 0
    assert torch.equal(routing.weight_N, score_TB[routing.token_N, routing.block_N])


def test_loads_even_out():
    sparse, x_TD = layer(LossFreeTopK(k=1, step=0.01)), random_inputs(256)
    start_B = sparse.eval().route(x_TD)[0].counts_B.float()
    sparse.train()
    for _ in range(200):
        sparse.route(x_TD)
    assert sparse.eval().route(x_TD)[0].counts_B.float().std() < 0.2 * start_B.std()


def test_without_a_bias_it_is_top_k_and_the_bias_survives_a_budget():
    sparse, x_TD = layer(LossFreeTopK(k=1)), random_inputs(64)
    score_TB = sparse.eval().route(x_TD)[1]
    for rule in (LossFreeTopK(k=2), LossFreeTopK(k=1).with_budget(2)):
        assert torch.equal(rule(score_TB).active_TB(), TopK(k=2)(score_TB).active_TB())
    sparse.train().route(x_TD)
    kept = sparse.select_state
    sparse.select = LossFreeTopK(k=2)
    assert sparse.select_state is kept


def test_always_on_blocks_are_refused():
    with pytest.raises(ValueError, match="always=1 is not supported with a bias"):
        LossFreeTopK(k=2, always=1)
