"""Elastic widths: budget codes, static routers that run as slices, token routers, and mixtures of levels."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from toys import tiny_model

from moesaic.ffn.sites import find_ffns
from moesaic.sparse.combine import Combine
from moesaic.sparse.elastic import (
    BudgetedLevelMLP,
    BudgetRouter,
    LevelMixture,
    StaticLevels,
    TokenLevels,
    budget_code,
    gumbel_noise,
    gumbel_softmax,
    level_logits,
    mixture_weights,
)
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN
from moesaic.sparse.levels import level_members
from moesaic.sparse.model import convert_model, load_model
from moesaic.sparse.select import AllBlocks, Prefix
from moesaic.sparse.trace import record_routing

TRAINED = (0.25, 0.5, 1.0)
LEVELS = (1, 2, 4)  # of 4 blocks


def static(budget: float = 0.5) -> StaticLevels:
    return StaticLevels(levels="geometric", budget=budget, trained_budgets=TRAINED, hidden=3)


def token(budget: float = 0.5) -> TokenLevels:
    return TokenLevels(levels="geometric", budget=budget, trained_budgets=TRAINED)


def rows(num_tokens: int = 7) -> Tensor:
    return torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(1))


def layer_of(select, score=None, family: str = "gpt2") -> SparseFFN:
    ffn = find_ffns(tiny_model(family))[0].read()
    experts = Experts.from_dense(ffn, torch.arange(48) // 12)
    module = None
    if score is not None:
        module = score.build(16, 4)
        module.initialise(experts, None, generator=torch.Generator().manual_seed(2))
    return SparseFFN(experts, module, select, Combine().build(16, 4)).eval()


def taught(layer: SparseFFN) -> SparseFFN:
    """A router that gives trained budget k level k: W1 makes the code visible, W2 copies it."""
    layer.select_state.fill(torch.eye(3), torch.eye(3))
    return layer


def dense_slice(layer: SparseFFN, x_TD: Tensor, blocks: int) -> Tensor:
    """The output of blocks 0..blocks-1 with the output bias, one block after the other."""
    bias_D = layer.experts.down_bias_D
    total_TD = torch.zeros_like(x_TD) if bias_D is None else bias_D.expand_as(x_TD).clone()
    for b in range(blocks):
        block = layer.experts.dense_ffn(b, b + 1)
        total_TD += block(x_TD) - (0 if block.down_bias_D is None else block.down_bias_D)
    return total_TD


def test_a_code_is_exact_at_trained_budgets_linear_between_and_clamped_outside():
    for k, budget in enumerate(TRAINED):
        assert budget_code(budget, TRAINED).tolist() == [float(i == k) for i in range(3)]
    assert budget_code(0.375, TRAINED).tolist() == [0.5, 0.5, 0.0]
    assert budget_code(0.9, TRAINED).tolist() == pytest.approx([0.0, 0.2, 0.8])
    assert torch.equal(budget_code(0.1, TRAINED), budget_code(0.25, TRAINED))
    assert torch.equal(budget_code(1.0, TRAINED[:2]), budget_code(0.5, TRAINED[:2]))
    assert budget_code(0.7, (0.5,)).tolist() == [1.0]
    for budget in torch.linspace(0.01, 1, 30).tolist():
        code_K = budget_code(budget, TRAINED)
        assert (code_K >= 0).all()
        assert code_K.sum().item() == pytest.approx(1)


def test_the_first_layer_of_the_router_interpolates_linearly():
    in_UK = torch.randn(5, 3)
    low_U, high_U = (in_UK @ budget_code(budget, TRAINED) for budget in (0.5, 1.0))
    torch.testing.assert_close(in_UK @ budget_code(0.6, TRAINED), 0.8 * low_U + 0.2 * high_U)


def test_the_static_router_is_its_formula():
    in_UK, out_EU, code_K = torch.randn(5, 3), torch.randn(4, 5), torch.tensor([0.3, 0.7, 0.0])
    hidden = [sum(in_UK[u, k] * code_K[k] for k in range(3)).item() for u in range(5)]
    leaky = [h if h > 0 else 0.1 * h for h in hidden]
    expected = [sum(out_EU[e, u].item() * leaky[u] for u in range(5)) for e in range(4)]
    torch.testing.assert_close(level_logits(code_K, in_UK, out_EU), torch.tensor(expected))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("budget", "blocks"), [(0.25, 1), (0.3, 1), (0.5, 2), (1.0, 4)])
def test_a_static_level_is_the_dense_slice_of_its_width(family, budget, blocks):
    layer, x_TD = taught(layer_of(static(budget), family=family)), rows()
    with record_routing(layer) as trace:
        y_TD = layer(x_TD)
    torch.testing.assert_close(y_TD, dense_slice(layer, x_TD, blocks))
    (record,) = trace.layers[0]
    assert record.executor == "slice"
    assert record.routing.counts_B.tolist() == [7] * blocks + [0] * (4 - blocks)
    layer.executor = "masked"
    torch.testing.assert_close(layer(x_TD), y_TD)


def test_full_width_is_dense_and_so_is_a_router_that_was_never_trained():
    dense = find_ffns(tiny_model("gpt2"))[0].read()
    x_TD = rows()
    torch.testing.assert_close(taught(layer_of(static(1.0)))(x_TD), dense(x_TD))
    torch.testing.assert_close(layer_of(static(0.25))(x_TD), dense(x_TD))


def test_static_routing_never_depends_on_the_input():
    layer = taught(layer_of(static(0.5)))
    counts = {tuple(layer.route(scale * rows(9))[0].counts_B.tolist()) for scale in (-5.0, 0.0, 1.0, 100.0)}
    assert counts == {(9, 9, 0, 0)}


def test_another_budget_keeps_the_router_and_another_router_is_looked_up_again():
    layer = taught(layer_of(static(0.25)))
    assert layer.static_blocks == 1
    layer.select = layer.select.with_budget(0.5)
    assert layer.static_blocks == 2
    layer.select_state.fill(torch.eye(3), torch.eye(3).flip(0))
    assert layer.static_blocks == 2
    layer.select = layer.select.with_budget(0.25)
    assert layer.static_blocks == 4
    layer.select_state.load_state_dict({"in_UK": torch.eye(3), "out_EU": torch.eye(3)})
    assert layer.static_blocks == 1
    assert isinstance(layer.select_state, BudgetRouter)
    assert StaticLevels.resolved(layer.select, layer.select_state) == Prefix(k=1)


def test_a_saved_model_answers_any_budget(tmp_path):
    dense = tiny_model("llama")
    ids_NC = torch.arange(10).view(1, 10)
    model = convert_model(dense, (taught(layer_of(static(0.25), family="llama")) for _ in range(2)))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    for budget in (0.25, 0.6, 1.0):
        for net in (model, loaded):
            for layer in net.modules():
                if isinstance(layer, SparseFFN):
                    layer.select = layer.select.with_budget(budget)
        assert torch.equal(loaded(ids_NC).logits, model(ids_NC).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.0}, r"select\.budget=0\.0 is outside"),
        ({"budget": 1.5}, r"select\.budget=1\.5 is outside"),
        ({"trained_budgets": ()}, r"trained_budgets=\[\] must rise"),
        ({"trained_budgets": (0.5, 0.25)}, "must rise"),
        ({"trained_budgets": (0.5, 1.2)}, "must rise"),
    ],
)
def test_impossible_budgets_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StaticLevels(**{"levels": "geometric", "budget": 0.5, "trained_budgets": TRAINED, **changes})


def test_token_levels_follow_the_logits_of_their_budget():
    score = BudgetedLevelMLP(trained_budgets=TRAINED, levels="geometric", hidden=6)
    layer, x_TD = layer_of(token(0.25), score), rows(40)
    module = layer.score
    with torch.no_grad():
        module.in_UK.mul_(20)
        module.out_EU.mul_(20)
    seen = []
    for budget in (0.25, 0.375, 1.0):
        layer.select = token(budget)
        routing, logits_TE = layer.route(x_TD)
        h_TU = nn.functional.silu(x_TD @ module.in_UD.T + module.in_UK @ budget_code(budget, TRAINED))
        torch.testing.assert_close(logits_TE, h_TU @ module.out_EU.T)
        expected_T = torch.tensor(LEVELS)[logits_TE.argmax(dim=1)]
        assert torch.equal(routing.count_T(), expected_T)
        seen.append(expected_T)
    assert not torch.equal(seen[0], seen[2])


def test_a_selection_without_a_budget_is_scored_at_the_largest():
    layer = layer_of(token(1.0), BudgetedLevelMLP(trained_budgets=TRAINED, levels="geometric"))
    x_TD = rows()
    _, at_full = layer.route(x_TD)
    layer.select = AllBlocks()
    routing, logits_TE = layer.route(x_TD)
    assert torch.equal(logits_TE, at_full)
    assert routing.counts_B.tolist() == [7] * 4


def test_a_score_and_a_selection_of_other_budgets_are_refused():
    layer = layer_of(token(), BudgetedLevelMLP(trained_budgets=(0.5, 1.0), levels="geometric"))
    with pytest.raises(ValueError, match=r"score\.trained_budgets=\[0\.5, 1\.0\] differ from select\.trained_budgets"):
        layer(rows())


def probabilities(num_rows: int = 6, num_levels: int = 3) -> Tensor:
    return (3 * torch.randn(num_rows, num_levels, generator=torch.Generator().manual_seed(3))).softmax(dim=1)


def mixed_layer(prob_TE: Tensor, mix: str) -> SparseFFN:
    rule = LevelMixture(
        levels="geometric", budget=0.5, trained_budgets=TRAINED, sample=lambda score_TX: prob_TE, mix=mix
    )
    layer = layer_of(static())
    layer.select = rule
    return layer


def test_a_soft_mix_is_the_mixture_of_the_levels_outputs():
    prob_TE, x_TD = probabilities(), rows(6)
    layer = mixed_layer(prob_TE, "soft")
    expected_TD = sum(prob_TE[:, e : e + 1] * dense_slice(layer, x_TD, blocks) for e, blocks in enumerate(LEVELS))
    torch.testing.assert_close(layer(x_TD), expected_TD)


def test_soft_weights_are_the_probability_of_a_level_with_the_block_and_exactly_one_in_block_0():
    prob_TE, members_EB = probabilities(200), level_members(LEVELS)
    weight_TB = mixture_weights(prob_TE, members_EB, "soft")
    torch.testing.assert_close(weight_TB, prob_TE @ members_EB.float())
    assert (weight_TB[:, 0] == 1).all()


def test_straight_through_runs_the_hard_slice_and_has_the_gradient_of_the_mixture():
    logits_TE = (2 * torch.randn(6, 3, generator=torch.Generator().manual_seed(4))).requires_grad_()
    x_TD, pull_TD = rows(6), rows(6).flip(0)
    layer = mixed_layer(logits_TE.softmax(dim=1), "straight_through")
    y_TD = layer(x_TD)
    for t, level in enumerate(logits_TE.argmax(dim=1)):
        torch.testing.assert_close(y_TD[t : t + 1], dense_slice(layer, x_TD[t : t + 1], LEVELS[level]))
    (gradient,) = torch.autograd.grad((y_TD * pull_TD).sum(), logits_TE)
    soft = mixed_layer(logits_TE.softmax(dim=1), "soft")(x_TD)
    (expected,) = torch.autograd.grad((soft * pull_TD).sum(), logits_TE)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().sum() > 0


def test_the_winning_prefix_times_its_probability():
    prob_TE, x_TD = probabilities(), rows(6)
    y_TD = mixed_layer(prob_TE, "hard_prob")(x_TD)
    layer = layer_of(static())
    bias_D = layer.experts.down_bias_D
    for t in range(6):
        best = prob_TE[t].argmax()
        slice_1D = dense_slice(layer, x_TD[t : t + 1], LEVELS[best]) - bias_D
        torch.testing.assert_close(y_TD[t : t + 1], prob_TE[t, best] * slice_1D + bias_D)


def test_gumbel_samples_repeat_with_the_seed_and_harden_as_the_temperature_falls():
    logits_XE = torch.zeros(2000, 3)
    logits_XE[:, 2] = 1.0

    def noise(seed: int) -> Tensor:
        return gumbel_noise((2000, 3), torch.Generator().manual_seed(seed))

    cold_XE = gumbel_softmax(logits_XE, noise(0), 1e-4)
    assert torch.equal(cold_XE, gumbel_softmax(logits_XE, noise(0), 1e-4))
    assert not torch.equal(cold_XE, gumbel_softmax(logits_XE, noise(1), 1e-4))
    assert (cold_XE.amax(dim=1) > 1 - 1e-6).float().mean() > 0.99
    # The winners are draws from softmax(logits): that is what the noise is for.
    share_E = cold_XE.argmax(dim=1).bincount(minlength=3) / 2000
    torch.testing.assert_close(share_E, logits_XE[0].softmax(dim=0), atol=0.04, rtol=0)
    orders = [gumbel_softmax(logits_XE, noise(0), tau).amax(dim=1).mean() for tau in (0.1, 1.0, 10.0)]
    assert all(colder > warmer for colder, warmer in itertools.pairwise(orders))
