"""Token-then-expert against loops; who is kept; what later tokens may change; what training leaves for inference."""

import math
from dataclasses import replace

import pytest
import torch
from toy_ffns import random_experts, random_ffn, random_inputs

from moesaic.sparse.capacity import AffinityMass, BoundCapacity, FixedCapacity
from moesaic.sparse.combine import Combine
from moesaic.sparse.grap import Grap
from moesaic.sparse.layer import SparseFFN
from moesaic.sparse.resonance import Floored, ResonanceState, TokenThenExpert, best_of, best_so_far
from moesaic.sparse.select import RoutingContext, TopK
from moesaic.sparse.softmax_combine import SoftmaxCombine
from moesaic.sparse.trace import count_routing

NUM_BLOCKS, DIM = 4, 8
FIXED = FixedCapacity(factor=0.6)
MODES = ["batch_topc", "no_drop", "threshold_ema", "prefix_causal"]


def scores(tokens=64, seed=0):
    return torch.randn(tokens, NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)) * DIM**-0.5


def context(state=None, *, training=False, sequences=1):
    state = ResonanceState(NUM_BLOCKS) if state is None else state
    return RoutingContext(
        num_blocks=NUM_BLOCKS, dim=DIM, training=training, num_sequences=sequences, state=state, notes={}
    )


def trained(rule, batches=20, tokens=256, sequences=1):
    state = rule.state(NUM_BLOCKS)
    for seed in range(batches):
        rule(scores(tokens, seed=100 + seed), context(state, training=True, sequences=sequences))
    return state


def layer(rule, *, bias=False):
    experts = random_experts(random_ffn(dim=DIM, width=32, bias=bias), NUM_BLOCKS)
    return SparseFFN(experts, Grap().build(DIM, NUM_BLOCKS), rule, Combine().build(DIM, NUM_BLOCKS))


def test_one_choice_without_capacity_is_token_choice():
    score_TB = scores()
    for training in (True, False):
        active_TB = TokenThenExpert(top_l=1, capacity=None)(score_TB, context(training=training)).active_TB()
        assert torch.equal(active_TB, TopK(k=1)(score_TB).active_TB())


def test_all_choices_without_capacity_are_the_dense_ffn():
    sparse = layer(TokenThenExpert(top_l=NUM_BLOCKS, capacity=None), bias=True)
    x_TD = random_inputs(20)
    torch.testing.assert_close(sparse(x_TD), sparse.experts.dense_ffn()(x_TD))


@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
@pytest.mark.parametrize("order", ["top", "bottom", "arrival"])
@pytest.mark.parametrize("top_l", [1, 2])
def test_against_a_loop_over_blocks(scope, order, top_l):
    score_TB = scores()
    rule = TokenThenExpert(top_l=top_l, capacity=FIXED, cap_scope=scope, ecr_order=order, eval_mode="batch_topc")
    active_TB = rule(score_TB, context(sequences=4)).active_TB()
    chosen_TB = TopK(k=top_l)(score_TB).active_TB()
    size = 16 if scope == "sequence" else 64
    slots = math.ceil(0.6 * top_l * size / NUM_BLOCKS - 1e-9)
    for first in range(0, 64, size):
        for block in range(NUM_BLOCKS):
            asking = [t for t in range(first, first + size) if chosen_TB[t, block]]
            key = {
                "top": lambda t: -score_TB[t, block].item(),  # noqa: B023
                "bottom": lambda t: score_TB[t, block].item(),  # noqa: B023
                "arrival": lambda t: t,
            }[order]
            kept = [t for t in range(first, first + size) if active_TB[t, block]]
            assert kept == sorted(sorted(asking, key=key)[:slots])


def test_kept_pairs_are_chosen_pairs_the_best_of_them_and_no_more_than_the_capacity():
    score_TB = scores(256)
    active_TB = TokenThenExpert(top_l=2, capacity=FIXED)(score_TB, context(training=True)).active_TB()
    chosen_TB = TopK(k=2)(score_TB).active_TB()
    assert not (active_TB & ~chosen_TB).any()
    assert active_TB.sum(0).max() <= math.ceil(0.6 * 2 * 256 / NUM_BLOCKS)
    for block in range(NUM_BLOCKS):
        dropped = score_TB[chosen_TB[:, block] & ~active_TB[:, block], block]
        assert score_TB[active_TB[:, block], block].min() >= dropped.max()


def test_ties_go_to_the_earlier_token():
    slots_NB = torch.tensor([[2]])
    everyone = torch.ones(1, 4, 1, dtype=torch.bool)
    assert best_of(torch.zeros(1, 4, 1), everyone, slots_NB).flatten().tolist() == [True, True, False, False]
    assert best_so_far(torch.zeros(1, 4, 1), everyone, torch.tensor([0.5])).flatten().tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_a_token_kept_nowhere_gets_exactly_nothing():
    sparse = layer(TokenThenExpert(top_l=1, capacity=FIXED), bias=True).train()
    x_TD = random_inputs(64)
    y_TD = sparse(x_TD)
    nowhere_T = sparse.route(x_TD)[0].count_T() == 0
    assert 0 < nowhere_T.sum() < 64
    assert (y_TD[nowhere_T] == 0).all()
    assert (y_TD[~nowhere_T].abs().sum(1) > 0).all()


def test_permuted_tokens_give_permuted_outputs():
    sparse = layer(TokenThenExpert(top_l=2, capacity=FIXED, eval_mode="batch_topc")).eval()
    x_TD, order_T = random_inputs(64), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sparse(x_TD[order_T]), sparse(x_TD)[order_T])


def future_changes_the_past(rule, state):
    score_TB = scores(32)
    changed_TB = score_TB.clone()
    changed_TB[16:] = scores(16, seed=7) + torch.tensor([1.0, 0.0, 0.0, 0.0])
    before, after = (rule(each, context(state)).active_TB()[:16] for each in (score_TB, changed_TB))
    return not torch.equal(before, after)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overflow", ["residual", "second_choice"])
def test_only_batch_topc_looks_ahead(mode, overflow):
    rule = TokenThenExpert(top_l=2, capacity=FIXED, eval_mode=mode, overflow=overflow)
    assert future_changes_the_past(rule, trained(rule)) == (mode == "batch_topc")
    assert rule.causal == (mode != "batch_topc")
    assert rule.decodes == (mode in ("no_drop", "threshold_ema"))


def test_later_sequences_do_not_change_earlier_ones_in_a_scope_of_one_sequence():
    rule = TokenThenExpert(top_l=2, capacity=FIXED, cap_scope="sequence", eval_mode="batch_topc")
    alone = rule(scores(32), context()).active_TB()
    together = rule(torch.cat([scores(32), scores(32, seed=3)]), context(sequences=2)).active_TB()
    assert torch.equal(alone, together[:32])


def test_without_capacity_every_mode_is_causal_and_keeps_all():
    for mode in MODES:
        rule = TokenThenExpert(top_l=2, capacity=None, eval_mode=mode)
        assert rule.causal
        assert rule(scores(), context(trained(rule))).counts_B.sum() == 128


def test_prefix_mode_against_a_loop():
    rule = TokenThenExpert(top_l=2, capacity=FIXED, eval_mode="prefix_causal")
    state, score_TB = trained(rule), scores(48)
    active_TB = rule(score_TB, context(state, sequences=2)).active_TB()
    chosen_TB = TopK(k=2)(score_TB).active_TB()
    for block in range(NUM_BLOCKS):
        for token in range(48):
            so_far = [t for t in range(token // 24 * 24, token + 1) if chosen_TB[t, block]]
            rank = 1 + sum(score_TB[t, block] >= score_TB[token, block] for t in so_far if t < token)
            allowed = max(1, math.ceil(state.kept_ratio_B[block].item() * len(so_far) - 1e-6))
            assert active_TB[token, block] == (bool(chosen_TB[token, block]) and rank <= allowed)


@pytest.mark.parametrize("order", ["top", "bottom"])
@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
@pytest.mark.parametrize("capacity", [FIXED, AffinityMass(rho=0.8, highest=1.1), BoundCapacity(highest=0.8)])
def test_thresholds_keep_the_share_that_training_kept(order, scope, capacity):
    rule = TokenThenExpert(top_l=2, capacity=capacity, ecr_order=order, cap_scope=scope)
    state = trained(rule, tokens=1024, sequences=4)
    score_TB = scores(8192, seed=5)
    seen = context(state)
    kept_B = rule(score_TB, seen).counts_B / TopK(k=2)(score_TB).counts_B
    assert (kept_B - state.kept_ratio_B).abs().max() < 0.05
    assert seen.notes["kept_frac"].item() == pytest.approx(state.kept_ratio_B.mean().item(), abs=0.05)
    assert state.kept_ratio_B.max() < 1


def test_before_training_nothing_is_dropped_and_inference_learns_nothing():
    rule = TokenThenExpert(top_l=2, capacity=FIXED)
    state = rule.state(NUM_BLOCKS)
    before = {name: value.clone() for name, value in state.state_dict().items()}
    for mode in MODES[1:]:
        assert TokenThenExpert(top_l=2, capacity=FIXED, eval_mode=mode)(scores(), context(state)).counts_B.sum() == 128
    assert rule(scores()).counts_B.sum() == 128  # outside a layer
    assert all(torch.equal(value, before[name]) for name, value in state.state_dict().items())


def test_averages_start_as_means_and_turn_exponential():
    rule, state = TokenThenExpert(top_l=1, capacity=FIXED, ema=0.75), ResonanceState(NUM_BLOCKS)
    least = []
    for seed in range(6):
        score_TB = scores(64, seed)
        active_TB = rule(score_TB, context(state, training=True)).active_TB()
        least.append(torch.where(active_TB, score_TB, torch.inf).amin(0))
    expected_B = torch.stack(least[:4]).mean(0)
    for new_B in least[4:]:
        expected_B = 0.75 * expected_B + 0.25 * new_B
    torch.testing.assert_close(state.threshold_B, expected_B)


def test_a_block_that_nobody_chose_keeps_its_averages():
    rule, state = TokenThenExpert(top_l=1, capacity=FIXED), ResonanceState(NUM_BLOCKS)
    score_TB = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 8)
    rule(score_TB, context(state, training=True))
    assert state.seen_B.tolist() == [1, 0, 0, 0]
    assert state.threshold_B.tolist() == [1.0, -math.inf, -math.inf, -math.inf]


def test_refused_tokens_ask_their_next_block_where_there_is_room():
    # Block 0 has one slot for four tokens; three of them fit into block 1, the last into nothing.
    score_TB = torch.tensor([[0.9, 0.1, 0, 0], [0.8, 0.4, 0, 0], [0.7, 0.3, 0, 0], [0.6, 0.2, 0, 0]])
    options = {"top_l": 1, "capacity": FixedCapacity(factor=1.0), "eval_mode": "batch_topc"}
    alone = TokenThenExpert(**options)(score_TB, context()).active_TB()
    assert alone.nonzero().tolist() == [[0, 0]]
    second = TokenThenExpert(**options, overflow="second_choice")(score_TB, context()).active_TB()
    assert second.nonzero().tolist() == [[0, 0], [1, 1]]
    roomy = TokenThenExpert(**{**options, "capacity": FixedCapacity(factor=2.0)}, overflow="second_choice")
    assert roomy(score_TB, context()).active_TB().nonzero().tolist() == [[0, 0], [1, 0], [2, 1], [3, 1]]


def test_the_second_choice_never_exceeds_the_capacity_nor_repeats_a_block():
    alone = TokenThenExpert(top_l=2, capacity=FixedCapacity(factor=1.1), eval_mode="batch_topc")
    rule = replace(alone, overflow="second_choice")
    score_TB = scores(256) + torch.tensor([0.3, 0.0, 0.0, 0.0])
    active_TB, first_TB = (each(score_TB, context()).active_TB() for each in (rule, alone))
    assert active_TB.sum(0).max() <= math.ceil(1.1 * 2 * 256 / NUM_BLOCKS)
    assert active_TB.sum(1).max() <= 2
    assert active_TB.sum() > first_TB.sum()
    assert not (first_TB & ~active_TB).any()


def test_notes_count_what_happened():
    score_TB = torch.tensor([[0.9, 0.1, 0, 0], [0.8, 0.4, 0, 0], [0.7, 0.3, 0, 0], [0.1, 0.2, 0, 0]])
    seen = context()
    TokenThenExpert(top_l=1, capacity=FixedCapacity(factor=2.0), eval_mode="batch_topc")(score_TB, seen)
    figures = {name: value.item() for name, value in seen.notes.items()}
    assert figures == pytest.approx(
        {
            "capacity_tokens": 2.0,
            "kept_frac": 0.75,
            "drop_frac": 0.25,
            "tokens_kept_nowhere_frac": 0.25,
            "demand_cv": math.sqrt(2),  # loads 3, 1, 0, 0: unbiased variance 2, mean 1
            "demand_max_violation": 2.0,
        }
    )


def test_no_gradient_flows_through_the_choice_but_through_the_weights():
    experts = random_experts(random_ffn(dim=DIM, width=32), NUM_BLOCKS)
    combine = SoftmaxCombine(gamma=1.0).build(DIM, NUM_BLOCKS)
    sparse = SparseFFN(experts, Grap().build(DIM, NUM_BLOCKS), TokenThenExpert(top_l=2, capacity=FIXED), combine)
    x_TD = random_inputs(16).requires_grad_()
    record = sparse.train().route(x_TD)[0]
    record.weight_N.sum().backward()
    assert x_TD.grad.abs().sum() > 0


def test_controls_run_the_wanted_share_within_one_capacity():
    score_TB = scores(1000) + torch.tensor([0.4, 0.0, 0.0, -0.1])
    rule = TokenThenExpert(top_l=2, capacity=FIXED)
    chosen_TB = TopK(k=2)(score_TB).active_TB()
    matched = rule.matched(score_TB, 0.3, NUM_BLOCKS)
    assert isinstance(matched, Floored)
    active_TB = matched(score_TB).active_TB()
    assert active_TB.float().mean().item() == pytest.approx(0.3, abs=NUM_BLOCKS / score_TB.numel())
    assert not (active_TB & ~chosen_TB).any()
    capacity = active_TB.sum(0).max()
    assert torch.equal(active_TB.sum(0), chosen_TB.sum(0).clamp(max=capacity))
    for block in range(NUM_BLOCKS):
        dropped = score_TB[chosen_TB[:, block] & ~active_TB[:, block], block]
        assert not len(dropped) or score_TB[active_TB[:, block], block].min() >= dropped.max()
    assert rule.matched(score_TB, 0.5, NUM_BLOCKS) == TopK(k=2)
    assert rule.matched(score_TB, 0.0, NUM_BLOCKS)(score_TB).counts_B.sum() == 0


def test_modes_of_inference_share_a_training_form():
    rules = [TokenThenExpert(top_l=2, capacity=FIXED, eval_mode=mode) for mode in MODES]
    assert len({rule.training_form() for rule in rules}) == 1
    arrival = TokenThenExpert(top_l=2, capacity=FIXED, ecr_order="arrival", eval_mode="batch_topc")
    assert arrival.training_form().eval_mode == "no_drop"


def test_no_tokens():
    assert TokenThenExpert(top_l=2, capacity=FIXED)(torch.zeros(0, 4), context(training=True)).counts_B.sum() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_l": 0}, "select.top_l=0 is not a whole number of blocks from 1"),
        ({"top_l": 2.5}, "select.top_l=2.5 is not a whole"),
        ({"ema": 1.0}, r"select.ema=1.0 is outside 0\.\.1"),
        ({"ecr_order": "arrival"}, "eval_mode=threshold_ema judges a token by its affinity.*batch_topc or no_drop"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenThenExpert(**{"top_l": 2, "capacity": FIXED, **changes})


def test_the_budget_is_the_number_of_choices():
    rule = TokenThenExpert(top_l=2, capacity=FIXED)
    assert rule.with_budget(3.0) == TokenThenExpert(top_l=3, capacity=FIXED)
    with pytest.raises(ValueError, match=r"exceeds partition\.num_blocks=4"):
        rule.with_budget(5).check(4)


def test_notes_are_made_only_where_somebody_reads_them():
    seen = replace(context(), observed=False)
    TokenThenExpert(top_l=2, capacity=FIXED, eval_mode="batch_topc")(scores(), seen)
    assert not seen.notes
    sparse = layer(TokenThenExpert(top_l=2, capacity=FIXED)).eval()
    with count_routing(sparse) as counts:
        sparse(random_inputs(16))
    assert counts.notes_L()["kept_frac"] == [1.0]
