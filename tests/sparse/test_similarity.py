"""Similarities of nested experts against brute force, closed-form values, and what their labels promise."""

import math

import pytest
import torch
from toy_ffns import block_outputs, random_experts, random_ffn, random_inputs

from moesaic.sparse.levels import level_shares
from moesaic.sparse.similarity import (
    SimilarityOracle,
    all_above_from,
    label_levels,
    level_similarity,
    similarity_of_outputs,
    theta_of_share,
)

LEVELS, TOKENS, DIM = (1, 2, 4, 8), 50, 8
SEEN_BY_FFN = ["proj", "cos", "rel_mse"]


def experts_of(*, bias: bool = True):
    return random_experts(random_ffn(dim=DIM, width=32, bias=bias), 8)


def outputs() -> torch.Tensor:
    """(T, E, D) in float64, by brute force."""
    return block_outputs(experts_of(), random_inputs(TOKENS)).cumsum(1)[:, [n - 1 for n in LEVELS]]


def similarities(measure: str) -> torch.Tensor:
    return level_similarity(experts_of(), random_inputs(TOKENS), LEVELS, measure)


@pytest.mark.parametrize("measure", SEEN_BY_FFN)
def test_similarities_equal_brute_force(measure):
    y_TED = outputs()
    expected = torch.zeros(TOKENS, len(LEVELS), dtype=torch.float64)
    for t in range(TOKENS):
        for e in range(len(LEVELS)):
            y_e, y = y_TED[t, e], y_TED[t, -1]
            if measure == "proj":
                expected[t, e] = y_e @ y / (y @ y)
            elif measure == "cos":
                expected[t, e] = y_e @ y / (y_e.norm() * y.norm())
            else:
                expected[t, e] = 1 - (y_e - y).square().sum() / y.square().sum()
    torch.testing.assert_close(similarities(measure).double(), expected, atol=1e-4, rtol=1e-4)


def test_the_whole_ffn_agrees_with_itself_and_the_measures_are_ordered():
    proj, cos, rel_mse = (similarities(measure) for measure in SEEN_BY_FFN)
    for score_TE in (proj, cos, rel_mse):
        torch.testing.assert_close(score_TE[:, -1], torch.ones(TOKENS))
    y_TED = outputs().float()
    share = y_TED.square().sum(-1) / y_TED[:, -1:].square().sum(-1)
    torch.testing.assert_close(rel_mse, 2 * proj - share, atol=1e-4, rtol=1e-4)
    assert (rel_mse <= cos.square() + 1e-5).all()
    assert (proj > 1).any()


def test_the_shortcut_of_proj_equals_the_projection_of_outputs():
    torch.testing.assert_close(similarities("proj"), similarity_of_outputs(outputs(), "proj"), atol=1e-5, rtol=1e-4)


def test_resid_cos_compares_what_the_stream_becomes_output_bias_included():
    experts, x_TD, r_TD = experts_of(), random_inputs(TOKENS), random_inputs(TOKENS, seed=5)
    score_TE = level_similarity(experts, x_TD, LEVELS, "resid_cos", residual_TD=r_TD)
    after_TED = (r_TD + experts.down_bias_D)[:, None] + outputs().float()
    expected_TE = torch.cosine_similarity(after_TED, after_TED[:, -1:], dim=-1)
    torch.testing.assert_close(score_TE, expected_TE, atol=1e-5, rtol=1e-4)


def test_spot_values():
    def of(measure: str, *y: tuple[float, float]) -> list[float]:
        return similarity_of_outputs(torch.tensor([y]), measure)[0].tolist()

    assert of("proj", (1, 0), (2, 0)) == [0.5, 1.0]
    assert of("cos", (1, 0), (2, 0)) == [1.0, 1.0]
    assert of("rel_mse", (1, 0), (2, 0)) == [0.75, 1.0]
    score_TE = similarity_of_outputs(torch.tensor([[(3.0, 0.0), (1.0, 0.0), (2.0, 0.0)]]), "proj")
    assert label_levels(score_TE, 0.6, "first_above").item() == 0
    assert label_levels(score_TE, 0.6, "all_above_from").item() == 2


def test_an_ffn_that_does_nothing_needs_itself_whole():
    y_TED = torch.zeros(2, 3, 4)
    y_TED[1] = torch.tensor([1.0, 0, 0, 0])
    for measure in SEEN_BY_FFN:
        score_TE = similarity_of_outputs(y_TED, measure)
        assert score_TE[0, :-1].isneginf().all()
        assert label_levels(score_TE, 0.5, "first_above").tolist() == [2, 0]
    assert math.isfinite(theta_of_share(score_TE, "first_above", level_shares((1, 2, 4)), 0.6))


@pytest.mark.parametrize("measure", SEEN_BY_FFN)
@pytest.mark.parametrize("rule", ["first_above", "all_above_from"])
def test_labels_never_fall_when_theta_rises(measure, rule):
    score_TE = similarities(measure)
    before_T = label_levels(score_TE, -math.inf, rule)
    assert (before_T == 0).all()
    for theta in torch.linspace(-1, 2, 61).tolist():
        label_T = label_levels(score_TE, theta, rule)
        assert (label_T >= before_T).all()
        assert (label_levels(score_TE, theta, "first_above") <= label_levels(score_TE, theta, "all_above_from")).all()
        before_T = label_T


def test_theta_1_asks_for_the_whole_ffn_unless_a_prefix_is_better_than_perfect():
    # Rounding may lift a similarity of 1 a little above it.
    for measure in ("cos", "rel_mse"):
        assert (label_levels(similarities(measure), 1 + 1e-6, "first_above") == len(LEVELS) - 1).all()
    assert (label_levels(similarities("proj"), 1 + 1e-6, "first_above") < len(LEVELS) - 1).any()


def test_all_above_from_against_a_loop():
    score_TE = torch.rand(200, 5, generator=torch.Generator().manual_seed(0))
    for t, label in enumerate(all_above_from(score_TE, 0.4).tolist()):
        expected = 4
        while expected > 0 and score_TE[t, expected - 1] > 0.4:
            expected -= 1
        assert label == expected


@pytest.mark.parametrize("rule", ["first_above", "all_above_from"])
@pytest.mark.parametrize("wanted", [0.25, 0.5, 0.75])
def test_theta_gives_the_wanted_share_as_near_as_tokens_allow(rule, wanted):
    score_TE, share_E = similarities("rel_mse"), level_shares(LEVELS)
    theta = theta_of_share(score_TE, rule, share_E, wanted)
    share = share_E[label_levels(score_TE, theta, rule)].mean().item()
    assert share == pytest.approx(wanted, abs=1 / TOKENS)


def test_the_oracle_scores_are_the_similarities():
    experts, x_TD = experts_of(), random_inputs(TOKENS)
    module = SimilarityOracle(similarity="rel_mse", levels=LEVELS).build(DIM, 8)
    assert torch.equal(module(x_TD, experts), similarities("rel_mse"))
    with pytest.raises(ValueError, match="resid_cos needs the residual stream"):
        SimilarityOracle(similarity="resid_cos")
