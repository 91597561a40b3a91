"""GrAP: cosines against group means, orthogonality, invariances, and the sizes that isotropic tokens give."""

import pytest
import torch
from toy_ffns import random_experts, random_ffn, random_inputs

from moesaic.sparse.grap import Grap, LearnedCos, cosines, group_cosines, group_directions, group_order
from moesaic.sparse.select import RoutingContext, TopK

MAPS = ["contiguous", "strided", "permutation", "rotation"]
DIM, NUM_BLOCKS = 24, 4


def built(score):
    experts = random_experts(random_ffn(dim=DIM, width=24), NUM_BLOCKS)
    module = score.build(DIM, NUM_BLOCKS)
    module.initialise(experts, None, generator=torch.Generator().manual_seed(0))
    return module, experts


@pytest.mark.parametrize("group_map", MAPS)
def test_directions_are_orthonormal_and_the_module_scores_their_cosines(group_map):
    direction_BD = group_directions(DIM, NUM_BLOCKS, group_map)
    torch.testing.assert_close(direction_BD @ direction_BD.T, torch.eye(NUM_BLOCKS), atol=1e-6, rtol=0)
    module, experts = built(Grap(group_map=group_map))
    x_TD = random_inputs(50, DIM)
    cosine_TB = torch.nn.functional.cosine_similarity(x_TD[:, None], direction_BD[None], dim=2)
    torch.testing.assert_close(module(x_TD, experts), cosine_TB, atol=1e-6, rtol=0)
    torch.testing.assert_close(Grap(group_map=group_map).affinity(x_TD, NUM_BLOCKS), cosine_TB, atol=1e-6, rtol=0)
    assert (cosine_TB.square().sum(1) <= 1 + 1e-6).all()


def test_group_means_equal_cosines_with_the_papers_vectors():
    x_TD = random_inputs(50, DIM)
    size = DIM // NUM_BLOCKS
    w_BD = torch.zeros(NUM_BLOCKS, DIM)
    for i in range(NUM_BLOCKS):
        w_BD[i, i * size : (i + 1) * size] = NUM_BLOCKS / DIM
    expected_TB = x_TD @ w_BD.T / w_BD.norm(dim=1) / x_TD.norm(dim=1, keepdim=True)
    torch.testing.assert_close(group_cosines(x_TD, NUM_BLOCKS), expected_TB, atol=1e-6, rtol=0)


def test_the_length_of_a_token_does_not_count_and_padding_scores_zero():
    module, experts = built(Grap())
    x_TD = random_inputs(20, DIM)
    torch.testing.assert_close(module(7.5 * x_TD, experts), module(x_TD, experts))
    assert (module(torch.zeros(2, DIM), experts) == 0).all()
    assert module(x_TD.bfloat16(), experts).dtype == torch.float32


def test_groups_by_hand():
    assert group_order(6, 2, "contiguous").tolist() == [0, 1, 2, 3, 4, 5]
    assert group_order(6, 2, "strided").tolist() == [0, 2, 4, 1, 3, 5]
    assert sorted(group_order(64, 4, "permutation").tolist()) == list(range(64))
    assert group_order(64, 4, "permutation").tolist() != list(range(64))
    strided_BD = group_directions(6, 2, "strided")
    assert strided_BD[1].tolist() == pytest.approx([0, 3**-0.5] * 3)


@pytest.mark.parametrize(("dim", "mean_top1", "prob"), [(4096, 0.022, 0.128), (128, 0.127, 0.142)])
def test_isotropic_tokens_have_the_sizes_of_the_specification(dim, mean_top1, prob):
    score_TB = group_cosines(torch.randn(4000, dim, generator=torch.Generator().manual_seed(0)), 8)
    assert score_TB.std().item() == pytest.approx(dim**-0.5, rel=0.03)
    assert score_TB.amax(1).mean().item() == pytest.approx(mean_top1, rel=0.03)
    assert score_TB.softmax(1).amax(1).mean().item() == pytest.approx(prob, rel=0.03)
    assert (dim**0.5 * score_TB).softmax(1).amax(1).mean().item() == pytest.approx(0.36, rel=0.03)


def test_centring_makes_the_group_means_sum_to_zero():
    x_TD = random_inputs(20, DIM)
    centred_TB = group_cosines(x_TD - x_TD.mean(1, keepdim=True), NUM_BLOCKS)
    torch.testing.assert_close(centred_TB.sum(1), torch.zeros(20), atol=1e-6, rtol=0)


def test_relu_mean_weighs_by_the_papers_logits_and_selects_by_cosines():
    module, experts = built(Grap(logits="relu_mean"))
    x_TD = random_inputs(200, DIM)
    mean_TB = x_TD.unflatten(1, (NUM_BLOCKS, -1)).mean(2)
    routing, logits_TB = module.route(x_TD, experts, TopK(k=1), RoutingContext(num_blocks=NUM_BLOCKS, dim=DIM))
    torch.testing.assert_close(logits_TB, mean_TB.relu(), atol=1e-6, rtol=0)
    block_T = routing.active_TB().float().argmax(1)
    assert torch.equal(block_T, logits_TB.argmax(1))
    silent_T = (mean_TB <= 0).all(1)
    assert silent_T.any()
    assert (block_T[silent_T] == 0).all()  # all logits 0: the tie goes to block 0


def test_learned_directions_start_as_the_fixed_ones_and_get_a_gradient():
    module, experts = built(LearnedCos(group_map="strided"))
    fixed, _ = built(Grap(group_map="strided"))
    x_TD = random_inputs(20, DIM)
    torch.testing.assert_close(module(x_TD, experts), fixed(x_TD, experts))
    module(x_TD, experts)[:, 0].sum().backward()
    assert module.weight_BD.grad[0].abs().sum() > 0
    assert not list(fixed.parameters())


def test_uneven_groups_are_refused_with_what_fits():
    with pytest.raises(ValueError, match=r"num_blocks=5 does not divide the model dim 24.*nearest that fit: 4, 6"):
        Grap().build(24, 5)


def test_cosines_take_any_unit_directions():
    x_TD = random_inputs(3, 4)
    assert cosines(x_TD, torch.eye(4)).square().sum(1).tolist() == pytest.approx([1, 1, 1])
