"""Levels: members and routings against slices, mixtures, routers, knobs, and what the rules promise."""

import math

import pytest
import torch
from toy_ffns import block_outputs, random_experts, random_ffn, random_inputs

from moesaic.sparse.combine import Combine
from moesaic.sparse.executors import EXECUTORS
from moesaic.sparse.layer import SparseFFN
from moesaic.sparse.levels import (
    FirstAbove,
    LevelCombine,
    LevelMLP,
    Nested,
    RandomLevels,
    SolvedKnobs,
    first_above,
    level_blocks,
    level_members,
    level_routing,
    level_shares,
    level_table,
    solve_rising,
)
from moesaic.sparse.select import AllBlocks, Prefix, RoutingContext

BLOCKS, DIM, TOKENS = 8, 8, 40
LISTED = (2, 4, 6, 8)


def logits(num_levels: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, num_levels, generator=torch.Generator().manual_seed(seed))


def with_knob(rule: Nested, knob: float) -> tuple[Nested, RoutingContext]:
    state = rule.state(BLOCKS)
    assert isinstance(state, SolvedKnobs)
    state.knob_K.fill_(knob)
    return rule.with_budget(0.5), RoutingContext(num_blocks=BLOCKS, state=state)


def levels_at(policy: str, score_TE: torch.Tensor, knob: float) -> torch.Tensor:
    rule, context = with_knob(Nested(policy=policy, shares=(0.5,)), knob)
    return rule.level_T(score_TE, context)


def layer_of(score, select, combine=None, *, bias: bool = False, executor: str = "auto") -> SparseFFN:
    experts = random_experts(random_ffn(dim=DIM, width=32, bias=bias), BLOCKS)
    module = None if score is None else score.build(DIM, BLOCKS)
    if module is not None:
        module.initialise(experts, None, generator=torch.Generator().manual_seed(2))
    return SparseFFN(experts, module, select, (combine or Combine()).build(DIM, BLOCKS), executor).eval()


def test_levels_are_block_counts_that_rise_to_all_blocks():
    assert level_blocks("linear", 4) == (1, 2, 3, 4)
    assert level_blocks("geometric", 8) == (1, 2, 4, 8)
    assert level_blocks(LISTED, 8) == LISTED
    assert level_members(level_blocks("geometric", 4)).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert level_shares(LISTED).tolist() == [0.25, 0.5, 0.75, 1.0]
    assert level_table(LISTED).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("levels", "blocks", "message"),
    [
        ("geometric", 6, r"no power of two \(nearest: 4, 8\)"),
        ((1, 2, 4), 8, r"rise to partition.num_blocks=8.*Nearest: \[1, 2, 4, 8\]"),
        ((4, 2, 8), 8, r"Nearest: \[2, 4, 8\]"),
        ((0, 8), 8, r"Nearest: \[8\]"),
        ((4, 16), 8, r"Nearest: \[4, 8\]"),
    ],
)
def test_levels_that_cannot_be_are_refused_with_the_nearest(levels, blocks, message):
    with pytest.raises(ValueError, match=message):
        Nested(levels=levels).check(blocks)


@pytest.mark.parametrize("executor", sorted(set(EXECUTORS) - {"dense"}))
def test_a_level_is_a_slice_of_its_width_under_every_executor(executor):
    level_T = torch.arange(TOKENS) % 4
    layer, x_TD = layer_of(None, AllBlocks()), random_inputs(TOKENS)
    y_TD = EXECUTORS[executor](x_TD, layer.experts, level_routing(level_T, level_members(LISTED)))
    for level, count in enumerate(LISTED):
        rows = layer.experts.rows(0, count)
        slice_TD = layer.experts.project(layer.experts.hidden(x_TD, rows), rows)
        torch.testing.assert_close(y_TD[level_T == level], slice_TD[level_T == level])


def test_soft_weights_over_all_blocks_are_the_mixture_of_the_levels():
    layer = layer_of(
        LevelMLP(levels=LISTED, init="full"), Nested(levels=LISTED), LevelCombine(levels=LISTED, by="soft")
    )
    with torch.no_grad():
        layer.score.out_EU.normal_(generator=torch.Generator().manual_seed(1))
    x_TD = random_inputs(TOKENS)
    prob_TE = layer.score(x_TD, layer.experts).softmax(1).double()
    prefix_TBD = block_outputs(layer.experts, x_TD).cumsum(1)
    expected_TD = sum(prob_TE[:, e, None] * prefix_TBD[:, n - 1] for e, n in enumerate(LISTED))
    torch.testing.assert_close(layer(x_TD).double(), expected_TD, atol=1e-5, rtol=1e-4)


def test_a_router_that_starts_full_starts_dense_and_one_that_starts_at_zero_at_the_smallest_level():
    x_TD = random_inputs(TOKENS)
    full, zero = (layer_of(LevelMLP(hidden=4, init=init), Nested(), bias=True) for init in ("full", "zero"))
    torch.testing.assert_close(full(x_TD), full.experts.dense_ffn()(x_TD))
    assert zero.route(x_TD)[0].count_T().tolist() == [1] * TOKENS


def test_only_a_router_that_is_not_detached_gives_its_input_a_gradient():
    for detached in (True, False):
        x_TD = random_inputs(TOKENS).requires_grad_()
        layer = layer_of(LevelMLP(detach_input=detached), Nested())
        with torch.no_grad():
            layer.score.out_EU.fill_(0.1)
        layer.score(x_TD, layer.experts).logsumexp(1).sum().backward()
        assert (x_TD.grad is None) == detached


def test_hard_levels_give_the_router_no_gradient():
    layer = layer_of(LevelMLP(), Nested())
    layer(random_inputs(TOKENS)).square().sum().backward()
    assert layer.experts.up_BSD.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in layer.score.parameters())


def test_one_plus_starts_as_one_and_only_alpha_has_a_gradient():
    x_TD = random_inputs(TOKENS)
    plain, scaled = (layer_of(LevelMLP(), Nested(), LevelCombine(by=by)) for by in ("one", "one_plus"))
    assert torch.equal(plain(x_TD), scaled(x_TD))
    scaled(x_TD).square().sum().backward()
    assert scaled.combine.alpha.grad.abs() > 0
    assert all(parameter.grad.abs().sum() == 0 for parameter in scaled.score.parameters())


@pytest.mark.parametrize(("alpha", "used"), [(-0.5, 0.0), (0.25, 0.25), (3.0, 1.0)])
def test_alpha_is_kept_from_0_to_1_but_not_its_gradient(alpha, used):
    combine = LevelCombine(by="one_plus").build(DIM, BLOCKS)
    combine.alpha.data.fill_(alpha)
    score_TE = logits(BLOCKS)
    weight_TB = combine(Nested()(score_TE), score_TE).weight_TB()
    prob_T = score_TE.softmax(1).amax(1)
    torch.testing.assert_close(weight_TB.amax(1), 1 + used * prob_T)
    weight_TB.sum().backward()
    assert combine.alpha.grad > 0


def test_prob_weighs_every_block_of_a_prefix_with_the_probability_of_its_level():
    score_TE = logits(4)
    combine = LevelCombine(levels=LISTED, by="prob").build(DIM, BLOCKS)
    routing = Nested(levels=LISTED)(score_TE)
    weight_TB = combine(routing, score_TE).weight_TB()
    for t in range(TOKENS):
        level = int(score_TE[t].argmax())
        for b in range(BLOCKS):
            expected = score_TE[t].softmax(0)[level] if b < LISTED[level] else 0.0
            assert weight_TB[t, b] == pytest.approx(float(expected))


def test_a_second_way_of_weighing_is_refused():
    with pytest.raises(ValueError, match=r"combine\.by alone"):
        LevelCombine(by="prob", weight="score")


@pytest.mark.parametrize("policy", ["biased", "cdf"])
def test_levels_never_fall_with_the_knob(policy):
    score_TE, before_T = logits(BLOCKS), torch.zeros(TOKENS, dtype=torch.int64)
    for knob in torch.linspace(-20, 20, 81).tolist():
        level_T = levels_at(policy, score_TE, knob)
        assert (level_T >= before_T).all()
        before_T = level_T
    assert (levels_at(policy, score_TE, -1e9) == 0).all()
    assert (levels_at(policy, score_TE, 1e9) == BLOCKS - 1).all()


def test_cdf_is_the_first_level_that_reaches_the_bound():
    score_TE = logits(BLOCKS)
    level_T = levels_at("cdf", score_TE, math.log(0.6 / 0.4))
    for t in range(TOKENS):
        total, level = 0.0, 0
        for level in range(BLOCKS):
            total += float(score_TE[t].softmax(0)[level])
            if total >= 0.6:
                break
        assert level_T[t] == level


@pytest.mark.parametrize("rule", [Nested(), FirstAbove(theta=0.1)])
def test_levels_of_a_token_do_not_change_with_others(rule):
    score_TE = logits(BLOCKS)
    changed_TE = torch.cat([score_TE[:10], logits(BLOCKS, seed=1)[10:]])
    assert rule.causal
    assert torch.equal(rule(score_TE).count_T()[:10], rule(changed_TE).count_T()[:10])


def test_knobs_are_interpolated_between_solved_shares():
    state = SolvedKnobs((0.25, 0.5, 0.75))
    state.knob_K.copy_(torch.tensor([-2.0, 0.0, 4.0]))
    assert [state.at(share) for share in (0.25, 0.375, 0.5, 0.625, 0.75)] == [-2.0, -1.0, 0.0, 2.0, 4.0]
    alone = SolvedKnobs((0.5,))
    alone.knob_K.fill_(3.0)
    assert alone.at(0.5) == 3.0


def test_a_share_without_a_knob_is_said():
    layer = layer_of(LevelMLP(), Nested(shares=(0.5,), mean_share=0.5))
    with pytest.raises(ValueError, match=r"mean_share=0\.5 has no knob yet.*SolveShares"):
        layer(random_inputs(3))
    with pytest.raises(ValueError, match=r"mean_share=0\.9 is outside of the solved shares \(0\.25\.\.0\.75\)"):
        Nested(shares=(0.25, 0.75)).with_budget(0.9)
    with pytest.raises(ValueError, match="must rise within"):
        Nested(shares=(0.5, 0.25))


def test_knobs_survive_another_budget_and_go_with_the_model():
    layer = layer_of(LevelMLP(), Nested(shares=(0.25, 0.75), mean_share=0.25))
    layer.select_state.knob_K.copy_(torch.tensor([-1e9, 1e9]))
    layer.select = layer.select.with_budget(0.75)
    assert layer.route(random_inputs(3))[0].count_T().tolist() == [BLOCKS] * 3
    assert "select_state.knob_K" in layer.state_dict()


def test_matched_controls_run_the_wanted_share():
    x_TD = random_inputs(4000)
    for wanted in (0.3, 0.5, 0.8):
        layer = layer_of(RandomLevels(), Nested())
        score_TE = layer.score(x_TD, layer.experts)
        layer.select = Nested().matched(score_TE, wanted, BLOCKS)
        share = layer.route(x_TD)[0].count_T().float().mean() / BLOCKS
        assert share == pytest.approx(wanted, abs=1e-3)
    assert isinstance(Prefix(k=3).matched(score_TE, 0.5, BLOCKS), Prefix)


def test_random_levels_are_even_at_theta_0():
    layer = layer_of(RandomLevels(), FirstAbove(theta=0.0))
    counts_E = torch.bincount(layer.route(random_inputs(8000))[0].count_T(), minlength=BLOCKS + 1)[1:]
    expected = 8000 / BLOCKS
    assert ((counts_E - expected).square() / expected).sum() < 24.3  # chi-square, 7 degrees of freedom, p 0.001


def test_the_best_knob_seen_is_kept_where_a_function_rises_only_nearly():
    seen = {0.0: 0.1, 1.0: 0.9, 0.5: 0.2, 0.75: 0.45, 0.875: 0.3}
    knob, share = solve_rising(lambda knob: seen.get(knob, 0.95), 0.5, 0.0, 1.0, tolerance=0.01, most_steps=3)
    assert (knob, share) == (0.75, 0.45)


def test_first_above_always_finds_a_level():
    score_TE = torch.tensor([[0.5, 0.9, 1.0], [0.1, 0.2, 0.0]])
    assert first_above(score_TE, 0.4).tolist() == [0, 2]
    assert first_above(score_TE, -math.inf).tolist() == [0, 0]


def test_a_router_of_negative_width_is_refused():
    with pytest.raises(ValueError, match=r"score\.hidden=-1"):
        LevelMLP(hidden=-1)
