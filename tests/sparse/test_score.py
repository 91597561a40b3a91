"""Scores: what the pages promise about them at the start, float32 everywhere, oracles as upper bounds, fair chance."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor
from toy_ffns import block_outputs, random_experts, random_ffn, random_inputs

from moesaic.sparse.executors import masked
from moesaic.sparse.experts import Experts
from moesaic.sparse.score import (
    Centroid,
    JointScoreModule,
    Linear,
    Oracle,
    RandomScore,
    Score,
    ScoreModule,
    SubsetOracle,
    TanhMLP,
    block_centroids,
)
from moesaic.sparse.select import AllBlocks, RoutingContext, Threshold, TopK
from moesaic.sparse.targets import captured_mass, expert_targets

NUM_BLOCKS = 6
SCORES: list[Score] = [
    Linear(),
    Linear(bias=False, activation="softmax"),
    TanhMLP(normalise_input=True),
    TanhMLP(normalise_input=False, activation="sigmoid"),
    TanhMLP(normalise_input=False, init="random"),
    Centroid(),
    Oracle(target="l1"),
    Oracle(target="output_norm"),
    SubsetOracle(),
    RandomScore(),
]


def built(score: Score, experts: Experts, *, seed: int = 0) -> ScoreModule:
    module = score.for_ffn(experts.dense_ffn()).build(experts.dim, experts.num_blocks)
    module.initialise(experts, random_inputs(64, experts.dim, seed=9), generator=Generator().manual_seed(seed))
    return module


def plain_experts(bias: bool = False) -> Experts:
    return random_experts(random_ffn(gated=False, bias=bias), NUM_BLOCKS)


@pytest.mark.parametrize("score", SCORES, ids=repr)
def test_float32_logits_whatever_autocast_says(score: Score) -> None:
    experts, x_TD = random_experts(random_ffn(), NUM_BLOCKS), random_inputs(7)
    module = built(score, experts)
    logits_TB = module(x_TD, experts)
    assert logits_TB.shape == (7, NUM_BLOCKS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast_TB = module(x_TD, experts)
        activated_TB = module.activate(under_autocast_TB)
    assert under_autocast_TB.dtype == activated_TB.dtype == torch.float32
    assert torch.equal(under_autocast_TB, logits_TB)
    assert module.config == score


@pytest.mark.parametrize("score", SCORES, ids=repr)
def test_a_bfloat16_model_still_gets_float32_logits(score: Score) -> None:
    experts = random_experts(random_ffn(), NUM_BLOCKS)
    module = built(score, experts)
    logits_TB = module.bfloat16()(random_inputs(7).bfloat16(), experts.bfloat16())
    assert logits_TB.dtype == torch.float32
    assert not torch.equal(logits_TB, logits_TB.bfloat16().float())


@pytest.mark.parametrize("score", SCORES, ids=repr)
def test_the_seed_decides_and_the_state_dict_holds_everything(score: Score) -> None:
    experts, x_TD = random_experts(random_ffn(), NUM_BLOCKS), random_inputs(7)
    before = torch.get_rng_state()
    module = built(score, experts, seed=3)
    logits_TB = module(x_TD, experts)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(built(score, experts, seed=3)(x_TD, experts), logits_TB)
    fresh = score.build(experts.dim, NUM_BLOCKS)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x_TD, experts), logits_TB)


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "softmax"])
def test_activations(activation: str) -> None:
    logits_TB = torch.tensor([[0.0, math.log(3.0)]])
    expected = {"identity": [0.0, math.log(3.0)], "sigmoid": [0.5, 0.75], "softmax": [0.25, 0.75]}[activation]
    module = Linear(activation=activation).build(4, 2)
    torch.testing.assert_close(module.activate(logits_TB), torch.tensor([expected]))
    assert module.activate(logits_TB.bfloat16()).dtype == torch.float32


def test_linear_is_a_matrix_product_and_starts_within_its_bounds() -> None:
    experts, x_TD = random_experts(random_ffn(), NUM_BLOCKS), random_inputs(7)
    module = built(Linear(), experts)
    torch.testing.assert_close(module(x_TD, experts), x_TD @ module.weight_BD.T + module.bias_B)
    assert 0.1 < module.weight_BD.abs().max() <= 8**-0.5
    assert 0 < module.bias_B.abs().max() <= 8**-0.5
    assert built(Linear(bias=False), experts).bias_B is None
    undecided = built(Linear(activation="sigmoid", init="zero"), experts)
    assert undecided.activate(undecided(x_TD, experts)).eq(0.5).all()


@pytest.mark.parametrize(("gated", "rows"), [(True, "auto"), (True, "up"), (False, "auto")])
def test_centroids_are_means_of_normalised_rows(gated: bool, rows: str) -> None:
    experts = random_experts(random_ffn(gated=gated), NUM_BLOCKS)
    row_BSD = experts.gate_BSD if gated and rows == "auto" else experts.up_BSD
    for block in range(NUM_BLOCKS):
        expected_D = torch.stack([row_D / row_D.norm() for row_D in row_BSD[block].detach()]).mean(0)
        torch.testing.assert_close(block_centroids(experts, rows)[block], expected_D)


def test_at_the_start_tanh_mlp_ranks_by_projection_and_centroid_by_distance() -> None:
    experts, x_TD = plain_experts(), random_inputs(40)
    centroid_BD = block_centroids(experts)
    projection_TB = nnf.normalize(x_TD, dim=1) @ centroid_BD.T
    mlp_TB = built(TanhMLP(), experts)(x_TD, experts)
    distance_TB = built(Centroid(), experts)(x_TD, experts)
    assert torch.equal(mlp_TB.argsort(1), projection_TB.argsort(1))
    assert torch.equal(distance_TB.argsort(1), (2 * projection_TB - centroid_BD.square().sum(1)).argsort(1))
    for token in range(40):
        for block in range(NUM_BLOCKS):
            expected = -(x_TD[token] / x_TD[token].norm() - centroid_BD[block]).norm()
            torch.testing.assert_close(distance_TB[token, block], expected)


def test_the_two_rankings_agree_once_centroids_have_length_one() -> None:
    experts, x_TD = plain_experts(), random_inputs(40)
    mlp, centroid = built(TanhMLP(), experts), built(Centroid(), experts)
    assert not torch.equal(mlp(x_TD, experts).argsort(1), centroid(x_TD, experts).argsort(1))
    unit_BD = nnf.normalize(block_centroids(experts), dim=1)
    with torch.no_grad():
        mlp.in_BD.copy_(unit_BD)
        centroid.centroid_BD.copy_(unit_BD)
    assert torch.equal(mlp(x_TD, experts).argsort(1), centroid(x_TD, experts).argsort(1))


def test_at_the_start_logits_stay_within_tanh_of_one() -> None:
    experts = random_experts(random_ffn(dim=2, width=24, gated=False), 24)  # one row per block: centroids of length 1
    x_TD = torch.cat([experts.up_BSD[:, 0].detach(), random_inputs(50, 2)])
    logits_TB = built(TanhMLP(activation="sigmoid"), experts)(x_TD, experts)
    assert logits_TB.abs().max() <= 0.7616
    assert logits_TB.max() > 0.76
    assert logits_TB.sigmoid().min() >= 0.3183
    assert logits_TB.sigmoid().max() <= 0.6817


def test_soft_bce_is_least_at_the_target_where_it_is_the_targets_entropy() -> None:
    target = torch.tensor([0.1, 0.5, 0.9])
    logit = target.logit().requires_grad_()
    loss = nnf.binary_cross_entropy_with_logits(logit, target)
    entropy = -(target * target.log() + (1 - target) * (1 - target).log())
    assert loss.item() == pytest.approx(entropy.mean().item())
    assert entropy.min() > 0.3
    loss.backward()
    torch.testing.assert_close(logit.grad, torch.zeros(3))


@pytest.mark.parametrize(("dim", "num_blocks", "size"), [(768, 96, 82_944), (1024, 128, 147_456), (2048, 176, 391_424)])
def test_router_sizes_of_the_method_page(dim: int, num_blocks: int, size: int) -> None:
    module = TanhMLP(normalise_input=True).build(dim, num_blocks)
    assert sum(parameter.numel() for parameter in module.parameters()) == size


def test_raw_inputs_start_as_if_they_had_mean_length_one() -> None:
    experts = random_experts(random_ffn(), NUM_BLOCKS)
    module = built(TanhMLP(), experts)
    mean_norm = random_inputs(64, seed=9).norm(dim=1).mean()
    torch.testing.assert_close(module.in_BD.detach(), block_centroids(experts) / mean_norm)
    one_TD = nnf.normalize(random_inputs(5), dim=1) * mean_norm
    homogeneous = built(TanhMLP(normalise_input=True), experts)
    torch.testing.assert_close(module(one_TD, experts), homogeneous(one_TD, experts))
    with pytest.raises(ValueError, match="raw x needs calibration inputs"):
        module.initialise(experts, None, generator=Generator())


@pytest.mark.parametrize(
    ("gated", "bias", "activation", "expected"),
    [
        (False, False, "relu", True),
        (False, True, "relu", False),
        (True, False, "relu", False),
        (False, False, "gelu", False),
    ],
)
def test_auto_normalises_only_where_it_cannot_change_the_ranking(
    gated: bool, bias: bool, activation: str, expected: bool
) -> None:
    ffn = random_ffn(gated=gated, bias=bias, activation=activation)
    assert TanhMLP().for_ffn(ffn) == TanhMLP(normalise_input=expected)
    assert TanhMLP(normalise_input=True).for_ffn(ffn) == TanhMLP(normalise_input=True)
    with pytest.raises(ValueError, match=r"normalise_input=auto depends on the FFN: call for_ffn\(ffn\)"):
        TanhMLP().build(8, NUM_BLOCKS)


@pytest.mark.parametrize(
    "score", [Oracle(target="positive"), Oracle(target="output_norm"), TanhMLP(), Centroid()], ids=repr
)
def test_plain_relu_without_bias_chooses_the_same_blocks_for_a_scaled_input(score: Score) -> None:
    experts, x_TD = plain_experts(), random_inputs(40)
    module = built(score, experts)
    for k in (1, 3):
        routed, scaled = (TopK(k=k)(module(c * x_TD, experts)) for c in (1.0, 3.7))
        assert torch.equal(routed.active_TB(), scaled.active_TB())
        y_TD, y_scaled_TD = masked(x_TD, experts, routed), masked(3.7 * x_TD, experts, scaled)
        torch.testing.assert_close(y_scaled_TD, 3.7 * y_TD)


@pytest.mark.parametrize(
    "experts",
    [plain_experts(bias=True), random_experts(random_ffn(), NUM_BLOCKS)],
    ids=["bias", "swiglu"],
)
def test_with_bias_or_gate_scale_matters_to_the_oracle(experts: Experts) -> None:
    x_TD, module = random_inputs(40), built(Oracle(target="positive"), experts)
    routed, scaled = (TopK(k=2)(module(c * x_TD, experts)).active_TB() for c in (1.0, 0.1))
    assert not torch.equal(routed, scaled)


def test_oracle_on_relu_is_dense_once_every_block_with_mass_runs() -> None:
    ffn = random_ffn(gated=False, width=24)
    experts, x_TD = random_experts(ffn, 24), random_inputs(30)  # blocks of one neuron, about half of them silent
    logits_TB = built(Oracle(target="positive"), experts)(x_TD, experts)
    with_mass_T = (logits_TB > 0).sum(1)
    assert with_mass_T.max() < 24
    for token in range(30):
        x_1D, y_1D = x_TD[token : token + 1], ffn(x_TD[token : token + 1])
        enough = TopK(k=int(with_mass_T[token]))(logits_TB[token : token + 1])
        torch.testing.assert_close(masked(x_1D, experts, enough), y_1D)
        too_few = TopK(k=int(with_mass_T[token]) - 1)(logits_TB[token : token + 1])
        assert not torch.allclose(masked(x_1D, experts, too_few), y_1D)


def test_oracle_logits_are_the_targets_without_gradient() -> None:
    experts, x_TD = random_experts(random_ffn(), NUM_BLOCKS), random_inputs(7).requires_grad_()
    logits_TB = built(Oracle(target="l2sq"), experts)(x_TD, experts)
    assert torch.equal(logits_TB, expert_targets(experts, x_TD, "l2sq"))
    assert not logits_TB.requires_grad


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_subset_oracle_is_nearest_to_the_dense_output(scale: float) -> None:
    experts, x_TD = random_experts(random_ffn(), NUM_BLOCKS), random_inputs(12)
    module = built(SubsetOracle(scale=scale), experts)
    assert isinstance(module, JointScoreModule)
    out_TBD = block_outputs(experts, x_TD)
    for k in range(NUM_BLOCKS + 1):
        routing, logits_TB = module.route(x_TD, experts, TopK(k=k), RoutingContext(num_blocks=NUM_BLOCKS))
        assert (routing.count_T() == k).all()
        torch.testing.assert_close(logits_TB, module(x_TD, experts))

        def error_T(active_TB: Tensor) -> Tensor:
            return (out_TBD.sum(1) - scale * (out_TBD * active_TB[:, :, None]).sum(1)).square().sum(1)

        for other in (Oracle(target="output_norm"), RandomScore(), Linear()):
            rival = TopK(k=k)(built(other, experts)(x_TD, experts))
            assert (error_T(routing.active_TB()) <= error_T(rival.active_TB()) + 1e-6).all()


def test_subset_oracle_with_all_blocks_and_with_a_selection_that_has_no_k() -> None:
    experts, x_TD = random_experts(random_ffn(), NUM_BLOCKS), random_inputs(5)
    module = built(SubsetOracle(), experts)
    routing, _ = module.route(x_TD, experts, AllBlocks(), RoutingContext(num_blocks=NUM_BLOCKS))
    assert routing.active_TB().all()
    with pytest.raises(ValueError, match=r"needs a fixed k, but select is Threshold\. Use TopK"):
        module.route(x_TD, experts, Threshold(tau=0.0), RoutingContext(num_blocks=NUM_BLOCKS))
    with pytest.raises(ValueError, match=r"chooses every block, but select\.always=1\. Use Oracle"):
        module.route(x_TD, experts, TopK(k=2, always=1), RoutingContext(num_blocks=NUM_BLOCKS))


def test_random_scores_depend_on_the_token_alone() -> None:
    experts, x_TD = random_experts(random_ffn(), NUM_BLOCKS), random_inputs(50)
    module = built(RandomScore(), experts)
    logits_TB = module(x_TD, experts)
    torch.testing.assert_close(
        torch.cat([module(x_1D, experts) for x_1D in x_TD.split(1)]), logits_TB, atol=1e-3, rtol=0
    )
    assert not torch.equal(logits_TB, built(RandomScore(), experts, seed=1)(x_TD, experts))


def test_random_scores_are_uniform_and_independent_between_blocks_and_tokens() -> None:
    experts = random_experts(random_ffn(dim=32, width=24), NUM_BLOCKS)
    x_TD = 5.0 + random_inputs(4000, 32)  # tokens that all point the same way: cosine about 0.96
    logits_TB = built(RandomScore(), experts)(x_TD, experts)
    assert logits_TB.min() >= 0
    assert logits_TB.max() <= 1
    for block in range(NUM_BLOCKS):
        largest_gap = (logits_TB[:, block].sort().values - torch.linspace(0, 1, 4000)).abs().max()
        assert largest_gap < 0.04
    correlation_BB = torch.corrcoef(logits_TB.T) - torch.eye(NUM_BLOCKS)
    assert correlation_BB.abs().max() < 0.06
    neighbours = torch.corrcoef(torch.stack([logits_TB[:-1, 0], logits_TB[1:, 0]]))[0, 1]
    assert neighbours.abs() < 0.06


@pytest.mark.parametrize("k", [1, 3])
def test_random_routing_gives_every_block_k_over_b_of_the_tokens_and_captures_k_over_b_of_the_mass(k: int) -> None:
    experts, x_TD = random_experts(random_ffn(dim=32, width=24), NUM_BLOCKS), random_inputs(4000, 32)
    target_TB = expert_targets(experts, x_TD, "l1")
    active_TB = TopK(k=k)(built(RandomScore(), experts)(x_TD, experts)).active_TB()
    torch.testing.assert_close(active_TB.float().mean(0), torch.full((NUM_BLOCKS,), k / NUM_BLOCKS), atol=0.03, rtol=0)
    assert captured_mass(target_TB, active_TB) == pytest.approx(k / NUM_BLOCKS, abs=0.02)


def test_any_token_even_a_zero_one_meets_every_block_over_seeds() -> None:
    experts = random_experts(random_ffn(), NUM_BLOCKS)
    x_TD = torch.cat([torch.zeros(1, 8), random_inputs(1)])
    count_TB = sum(
        TopK(k=2)(built(RandomScore(), experts, seed=seed)(x_TD, experts)).active_TB().float() for seed in range(1500)
    )
    torch.testing.assert_close(count_TB / 1500, torch.full((2, NUM_BLOCKS), 2 / NUM_BLOCKS), atol=0.05, rtol=0)


def test_padding_of_length_zero_gives_finite_logits_and_gradients() -> None:
    experts, x_TD = plain_experts(), torch.zeros(3, 8)
    for score in SCORES:
        assert built(score, experts)(x_TD, experts).isfinite().all()
    module = built(TanhMLP(), experts)
    module(x_TD, experts).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_components_are_values() -> None:
    assert replace(Linear(), activation="softmax") == Linear(activation="softmax")
    assert len({TanhMLP(), TanhMLP(), Centroid()}) == 2
