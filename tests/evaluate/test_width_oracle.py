"""The width oracle against brute force over all patterns of a toy, its beam, and where learned routing is placed."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as nnf
from methods.toy import ids_NC
from scipy.stats import spearmanr
from torch import Tensor
from toys import tiny_model

from moesaic.evaluate.width_oracle import beam, search_widths, token_losses
from moesaic.ffn.sites import find_ffns
from moesaic.report.width_figure import draw_width_oracle
from moesaic.sparse.combine import Combine
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.levels import LevelMLP
from moesaic.sparse.model import convert_model
from moesaic.sparse.select import Prefix, Threshold

LEVELS = (1, 2, 4)


def nested_model(num_layers: int = 3):
    """A toy whose FFNs are cut into 4 blocks, with a random score for each block."""
    dense = tiny_model("llama", num_hidden_layers=num_layers)
    layers = []
    for index, site in enumerate(find_ffns(dense)):
        experts = Experts.from_dense(site.read(), torch.arange(48) // 12)
        experts.down_BSD.data.mul_(3)  # so that widths matter
        score = LevelMLP(levels="linear", hidden=4).build(16, 4)
        score.initialise(experts, None, generator=torch.Generator().manual_seed(index))
        torch.nn.init.normal_(score.out_EU, generator=torch.Generator().manual_seed(index))
        layers.append(SparseFFN(experts, score, Threshold(tau=0.0), Combine().build(16, 4)))
    return convert_model(dense, layers).eval()


def brute_force(model, ids: Tensor, levels) -> dict[tuple[int, ...], Tensor]:
    """Loss of every scored token under every pattern, one window at a time."""
    losses = {}
    for pattern in itertools.product(range(len(levels)), repeat=len(sparse_layers(model))):
        for layer, level in zip(sparse_layers(model), pattern, strict=True):
            layer.select = Prefix(k=levels[level])
        with torch.no_grad():
            losses[pattern] = torch.cat(
                [nnf.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none") for row in ids]
            )
    return losses


@pytest.fixture(scope="module")
def searched():
    model, ids = nested_model(), ids_NC(5)
    found = search_widths(model, ids, LEVELS, budgets=(-0.2, 0.2), batch_size=2)
    return model, ids, found, brute_force(nested_model(), ids, LEVELS)


def test_each_tokens_best_pattern_of_each_cost_is_that_of_brute_force(searched):
    _, _, found, losses = searched
    costs = {pattern: sum(LEVELS[level] for level in pattern) for pattern in losses}
    assert set(found.best) == set(costs.values())
    assert found.exhaustive
    for cost, best in found.best.items():
        own = {pattern: losses[pattern] for pattern in losses if costs[pattern] == cost}
        assert set(best.patterns) == set(own)
        stacked_PT = torch.stack(list(own.values()))
        torch.testing.assert_close(best.loss_T, stacked_PT.amin(dim=0))
        for t, level_L in enumerate(best.level_TL.tolist()):
            torch.testing.assert_close(own[tuple(level_L)][t], best.loss_T[t])
        means = dict(zip(best.patterns, best.nats_P, strict=True))
        assert means == pytest.approx({pattern: loss_T.mean().item() for pattern, loss_T in own.items()}, rel=1e-5)
    torch.testing.assert_close(found.full_T, losses[2, 2, 2])
    torch.testing.assert_close(found.gap_T, losses[0, 0, 0] - losses[2, 2, 2])


def test_the_summary_by_hand(searched):
    _, _, found, losses = searched
    summary = found.summary()
    assert summary["protocol"]["patterns"] == 27
    assert summary["protocol"]["tokens"] == 5 * 15
    for row in summary["budgets"]:
        cost = round(row["share"] * 12)
        own = {p: loss_T for p, loss_T in losses.items() if sum(LEVELS[level] for level in p) == cost}
        means = [loss_T.mean().item() for loss_T in own.values()]
        best = min(own, key=lambda p: own[p].mean().item())
        assert row["patterns"] == len(own)
        assert row["random_nats"] == pytest.approx(np.mean(means), rel=1e-5)
        assert row["best_pattern"]["blocks_L"] == [LEVELS[level] for level in best]
        assert row["oracle_nats"] <= row["best_pattern"]["nats"] + 1e-6
        winners = [list(own)[i] for i in torch.stack(list(own.values())).argmin(dim=0).tolist()]
        for layer, use_E in enumerate(row["use_LE"]):
            counts = np.bincount([pattern[layer] for pattern in winners], minlength=3)
            assert use_E == pytest.approx(counts / len(winners))
    gap_T, full_T = losses[0, 0, 0] - losses[2, 2, 2], losses[2, 2, 2]
    difficulty = summary["difficulty"]
    assert difficulty["gap_nats"] == pytest.approx(gap_T.mean().item(), rel=1e-4)
    assert difficulty["narrow_better_frac"] == pytest.approx((gap_T < 0).float().mean().item())
    assert difficulty["gap_loss_rank_correlation"] == pytest.approx(spearmanr(gap_T, full_T).statistic, abs=1e-4)
    any_T = torch.stack(list(losses.values())).amin(dim=0)
    order = full_T.argsort()[:8]  # the first tenth of 75, the larger ones first
    first = difficulty["by_full_loss"][0]
    assert first["gap_nats"] == pytest.approx(gap_T[order].mean().item(), rel=1e-4)
    assert first["below_full_nats"] == pytest.approx((full_T - any_T)[order].mean().item(), rel=1e-4)
    positions = gap_T.view(5, 15).mean(dim=0)
    assert difficulty["gap_nats_by_position"][0] == pytest.approx(positions[:2].mean().item(), rel=1e-4)


def test_the_learned_routing_is_placed_between_random_patterns_and_the_oracle(searched):
    model, ids, found, _ = searched
    for point, place in zip(found.learned, found.summary()["learned"], strict=True):
        for layer in sparse_layers(model):
            layer.select = Threshold(tau=point.budget)
        with torch.no_grad():
            torch.testing.assert_close(point.loss_T, token_losses(model, ids, 5))
        share = place["share"]
        assert share == pytest.approx(point.share_T.mean().item())
        assert 0.25 < share < 1
        below, above = sorted(sorted(found.best), key=lambda cost: abs(found.share(cost) - share))[:2]
        ends = [np.mean(found.best[cost].nats_P) for cost in (below, above)]
        assert min(ends) - 1e-6 <= place["random_nats"] <= max(ends) + 1e-6
        expected = (place["random_nats"] - place["nats"]) / (place["random_nats"] - place["oracle_nats"])
        assert place["place_frac"] == pytest.approx(expected)
        beaten = np.mean([nats > place["nats"] for nats in found.best[below].nats_P])
        assert place["beaten_patterns_frac"] == pytest.approx(beaten)


def test_a_static_pattern_is_placed_as_itself():
    model, ids = nested_model(2), ids_NC(2)
    for layer in sparse_layers(model):
        layer.select = Prefix(k=4)
    found = search_widths(model, ids, LEVELS, budgets=(2,))
    (place,) = found.summary()["learned"]
    assert place["share"] == 0.5
    assert place["nats"] == pytest.approx(found.best[4].nats_P[found.best[4].patterns.index((1, 1))], rel=1e-5)
    assert place["share_gap_rank_correlation"] is None
    assert {layer.select for layer in sparse_layers(model)} == {Prefix(k=4)}


def test_shares_of_learned_tokens_are_those_of_the_scored_positions():
    model, ids = nested_model(2), ids_NC(3)
    (point,) = search_widths(model, ids, (1, 4), budgets=(0.1,), batch_size=2).learned
    counts: list[Tensor] = []
    for layer in sparse_layers(model):
        layer.select = Threshold(tau=0.1)
        layer.register_forward_pre_hook(
            lambda layer, args: counts.append(layer.route(args[0].flatten(0, 1))[0].count_T().view(3, -1))
        )
    with torch.no_grad():
        model(ids)
    expected = sum(count_NC.float() / 4 for count_NC in counts)[:, :-1].flatten() / 2
    torch.testing.assert_close(point.share_T, expected)


def test_a_wide_beam_tries_every_pattern_once():
    generator = torch.Generator().manual_seed(0)
    losses = {p: torch.rand(4, generator=generator) for p in itertools.product(range(3), repeat=3)}
    tried = dict(pairs := list(beam(losses.__getitem__, 3, 3, 10_000)))
    assert len(pairs) == len(tried) == 27
    assert all(tried[pattern] is losses[pattern] for pattern in losses)


def test_a_narrow_beam_widens_the_best_pattern_one_layer_at_a_time():
    model = nested_model(4)
    losses = brute_force(nested_model(4), ids_NC(3), (1, 4))
    found = search_widths(model, ids_NC(3), (1, 4), limit=15)
    assert not found.exhaustive
    assert found.summary()["protocol"]["search"] == "beam"
    assert [len(found.best[cost].patterns) for cost in (4, 7, 10, 13, 16)] == [1, 4, 3, 2, 1]
    for cost, wider in itertools.pairwise((4, 7, 10, 13, 16)):
        kept = min(found.best[cost].patterns, key=lambda pattern: losses[pattern].mean().item())
        for pattern in found.best[wider].patterns:
            assert sum(a != b for a, b in zip(kept, pattern, strict=True)) == 1
        own = [losses[pattern] for pattern in found.best[wider].patterns]
        torch.testing.assert_close(found.best[wider].loss_T, torch.stack(own).amin(dim=0))


@pytest.mark.parametrize(
    ("levels", "limit", "message"),
    [
        ((1, 2), 10, r"levels \[1, 2\] must end with all blocks"),
        ((4,), 10, "two or more rising block counts"),
        ((2, 1, 4), 10, "two or more rising block counts"),
        ((0, 4), 10, "two or more rising block counts"),
        ((1, 4), 1, "limit=1 at least 2"),
    ],
)
def test_what_cannot_be_searched_is_refused(levels, limit, message):
    with pytest.raises(ValueError, match=message):
        search_widths(nested_model(2), ids_NC(1), levels, limit=limit)


def test_tokens_and_picture_are_written(searched, tmp_path):
    _, ids, found, losses = searched
    frame = pd.DataFrame(found.rows())
    frame.to_parquet(tmp_path / "tokens.parquet")
    read = pd.read_parquet(tmp_path / "tokens.parquet")
    assert len(read) == 75
    assert read["token"].tolist() == ids[:, 1:].flatten().tolist()
    assert read["position"].tolist()[:3] == [1, 2, 3]
    assert read["full_nats"].tolist() == pytest.approx(losses[2, 2, 2].tolist(), rel=1e-4)
    assert read["oracle_levels_12"].map(list).tolist() == [[2, 2, 2]] * 75
    figure = draw_width_oracle(found.summary(), "a toy")
    loss, layers, gain = figure.axes[:3]
    assert "oracle per token (bound)" in [text.get_text() for text in loss.get_legend().get_texts()]
    assert len(layers.get_yticks()) == 3
    assert len(gain.patches) == 20
