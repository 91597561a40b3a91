"""Selections against a loop over tokens; ties, zero blocks, budgets and refusals."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moesaic.sparse.select import (
    AllBlocks,
    CumulativeProbability,
    DynamicK,
    Prefix,
    RoutingContext,
    Selection,
    Threshold,
    TopK,
    top_blocks,
)


def by_score(row: list[float]) -> list[int]:
    """Blocks, best first, ties to the lowest index."""
    return sorted(range(len(row)), key=lambda block: (-row[block], block))


def cumulative(row: list[float], p: float) -> set[int]:
    chosen, total = set(), 0.0
    for block in by_score(row):
        if chosen and (row[block] == 0 or total >= p * sum(row)):
            break
        chosen.add(block)
        total += row[block]
    return chosen


RULES: list[tuple[Selection, Callable[[list[float]], set[int]]]] = [
    (AllBlocks(), lambda row: set(range(len(row)))),
    (Prefix(k=0), lambda row: set()),
    (Prefix(k=3), lambda row: {0, 1, 2}),
    (TopK(k=0), lambda row: set()),
    (TopK(k=1), lambda row: set(by_score(row)[:1])),
    (TopK(k=4), lambda row: set(by_score(row)[:4])),
    (TopK(k=6), lambda row: set(range(6))),
    (TopK(k=2, always=2), lambda row: {0, 1}),
    (TopK(k=4, always=2), lambda row: {0, 1, *[block for block in by_score(row) if block > 1][:2]}),
    (TopK(k=6, always=1), lambda row: set(range(6))),
    (Threshold(tau=0.4), lambda row: {b for b, s in enumerate(row) if s > torch.tensor(0.4).item()}),
    (Threshold(tau=2.0), lambda row: set()),
    (DynamicK(tau=0.6), lambda row: {b for b, s in enumerate(row) if s >= 0.6 * max(row) - 1e-9}),
    (DynamicK(tau=0.0), lambda row: set(range(len(row)))),
    (DynamicK(tau=1.0), lambda row: {b for b, s in enumerate(row) if s == max(row)}),
    (CumulativeProbability(p=0.5), lambda row: cumulative(row, 0.5)),
    (CumulativeProbability(p=1e-9), lambda row: {by_score(row)[0]}),
    (CumulativeProbability(p=1.0), lambda row: {b for b, s in enumerate(row) if s > 0} or {0}),
]


def scores() -> Tensor:
    """Random scores >= 0 on a coarse grid, so that ties are everywhere, some rows all equal or all zero."""
    grid_TB = torch.randint(0, 5, (60, 6), generator=torch.Generator().manual_seed(0)).float() / 4
    grid_TB[:2], grid_TB[2:4] = 0.0, 0.75
    return grid_TB


@pytest.mark.parametrize(("select", "expected"), RULES, ids=[repr(rule) for rule, _ in RULES])
def test_against_a_loop_over_tokens(select: Selection, expected: Callable[[list[float]], set[int]]) -> None:
    score_TB = scores()
    routing = select(score_TB)
    for token, row in enumerate(score_TB.tolist()):
        assert set(routing.block_N[routing.token_N == token].tolist()) == expected(row), row
    assert (routing.num_tokens, routing.num_blocks) == (60, 6)
    assert (routing.weight_N == 1).all()
    assert routing.counts_B.sum() == routing.block_N.numel()


@pytest.mark.parametrize("select", [rule for rule, _ in RULES], ids=repr)
def test_no_tokens(select: Selection) -> None:
    routing = select(torch.zeros(0, 6))
    assert routing.counts_B.tolist() == [0] * 6


def test_top_blocks_are_ordered_and_ties_go_to_the_lowest_index_in_wide_rows_too() -> None:
    assert top_blocks(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 3).tolist() == [[1, 2, 3]]
    assert top_blocks(torch.zeros(3, 2000), 50).tolist() == [list(range(50))] * 3


def test_all_positive_scores_run_at_p_one_however_small() -> None:
    tiny_TB = torch.tensor([[1.0, 1e-30, 0.0, 1e-20]])
    assert CumulativeProbability(p=1.0)(tiny_TB).active_TB().tolist() == [[True, True, False, True]]


def test_dynamic_k_never_leaves_a_token_without_a_block_and_ignores_a_tokens_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    score_TB = torch.rand(20, 6, generator=generator)
    sizes = [DynamicK(tau=tau / 10)(score_TB).count_T() for tau in range(11)]
    assert all((later <= earlier).all() for earlier, later in pairwise(sizes))
    assert (sizes[-1] == 1).all()
    assert (DynamicK(tau=0.5)(-score_TB).count_T() >= 1).all()
    scaled_TB = score_TB * 8.0  # a power of two, so that rounding stays out of it
    active = DynamicK(tau=0.5)(score_TB).active_TB()
    assert torch.equal(active, DynamicK(tau=0.5)(scaled_TB).active_TB())


@pytest.mark.parametrize(
    ("select", "value", "expected"),
    [
        (TopK(k=2), 5, TopK(k=5)),
        (TopK(k=2), 3.0, TopK(k=3)),
        (TopK(k=2), 0, TopK(k=0)),
        (TopK(k=2, always=1), 3, TopK(k=3, always=1)),
        (Prefix(k=1), 4.0, Prefix(k=4)),
        (Threshold(tau=0.5), -1.5, Threshold(tau=-1.5)),
        (DynamicK(tau=0.5), 1, DynamicK(tau=1)),
        (CumulativeProbability(p=0.5), 0.9, CumulativeProbability(p=0.9)),
    ],
)
def test_with_budget_sets_the_knob(select: Selection, value: float, expected: Selection) -> None:
    changed = select.with_budget(value)
    assert changed == expected
    assert type(getattr(changed, select.knob)) is type(getattr(expected, select.knob))


@pytest.mark.parametrize(
    ("select", "value", "message"),
    [
        (TopK(k=2), 2.5, "select.k=2.5 is not a whole number"),
        (TopK(k=2), -1, "select.k=-1 is not a whole number of blocks from 0"),
        (TopK(k=2), float("nan"), "select.k=nan"),
        (TopK(k=2, always=2), 1, r"select.always=2 is outside 0..select.k=1: always-on blocks count as active"),
        (TopK(k=2), float("inf"), "select.k=inf"),
        (Prefix(k=2), 0.5, "select.k=0.5"),
        (DynamicK(tau=0.5), 1.5, r"select.tau=1.5 is outside 0\.\.1"),
        (DynamicK(tau=0.5), float("nan"), "select.tau=nan"),
        (CumulativeProbability(p=0.5), 0, "select.p=0 is outside"),
        (AllBlocks(), 3, "AllBlocks has no budget"),
    ],
)
def test_with_budget_refuses(select: Selection, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select.with_budget(value)


@pytest.mark.parametrize("select", [TopK(k=9), Prefix(k=9)])
def test_more_blocks_than_there_are_is_refused_with_what_to_do(select: Selection) -> None:
    with pytest.raises(
        ValueError, match=r"select.k=9 exceeds partition.num_blocks=8 \(allowed: 0..8\). Lower k or cut"
    ):
        select.check(8)
    select.check(9)


def test_every_shipped_selection_is_causal_and_says_its_knob() -> None:
    knobs = {type(rule).__name__: (rule.knob, rule.causal) for rule, _ in RULES}
    assert knobs == {
        "AllBlocks": ("", True),
        "Prefix": ("k", True),
        "TopK": ("k", True),
        "Threshold": ("tau", True),
        "DynamicK": ("tau", True),
        "CumulativeProbability": ("p", True),
    }


def test_only_rules_that_ignore_scores_are_static_and_then_run_a_prefix() -> None:
    score_TB = scores()
    for rule, _ in RULES:
        width = rule.static_blocks(6)
        assert (width is not None) == isinstance(rule, AllBlocks | Prefix)
        if width is not None:
            expected_TB = (torch.arange(6) < width).expand(60, 6)
            assert torch.equal(rule(score_TB).active_TB(), expected_TB)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("rule", [Threshold(tau=0.5), DynamicK(tau=0.5), CumulativeProbability(p=0.5)], ids=repr)
def test_a_matched_rule_runs_the_wanted_share_of_pairs(rule: Selection, share: float) -> None:
    assert rule.adaptive
    score_TB = torch.rand(50, 8, generator=torch.Generator().manual_seed(1))
    routing = rule.matched(score_TB, share, 8)(score_TB)
    assert routing.token_N.numel() == round(share * 400)
    # Not as many for each token, but the highest scores of all.
    active_TB = routing.active_TB()
    if 0 < share < 1:
        assert score_TB[active_TB].min() > score_TB[~active_TB].max()


@pytest.mark.parametrize(("rule", "expected"), [(TopK(k=1), TopK(k=3)), (Prefix(k=1), Prefix(k=3))])
def test_a_matched_rule_with_a_fixed_number_keeps_one(rule: Selection, expected: Selection) -> None:
    assert not rule.adaptive
    assert rule.matched(torch.rand(5, 4), 0.75, 4) == expected


def test_always_on_blocks_stay_on_when_matched() -> None:
    assert TopK(k=3, always=2).matched(torch.rand(5, 8), 0.125, 8) == TopK(k=2, always=2)


def test_tokens_that_no_router_wants_are_counted() -> None:
    score_TB = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.0], [1.0, 2.0]])
    context = RoutingContext(num_blocks=2)
    routing = DynamicK(tau=0.5)(score_TB, context)
    assert routing.active_TB().tolist() == [[True, True], [True, False], [True, True], [True, True]]
    assert context.notes["all_zero_share"] == 0.5
