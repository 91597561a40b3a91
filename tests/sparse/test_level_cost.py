"""What levels cost: expected cost, latency tables, and where they do not fit."""

import json

import pytest
import torch

from moesaic.config.errors import ConfigError
from moesaic.config.strict import to_plain
from moesaic.sparse.level_cost import LatencyTable, expected_cost, read_latency_table

TABLE = {
    "blocks_X": [1, 2, 4],
    "ms_X": [0.5, 0.8, 2.0],
    "num_blocks": 4,
    "dim": 16,
    "width": 48,
    "tokens": 8,
    "dtype": "float32",
    "threads": 1,
    "device": "cpu",
}


def test_one_hot_probabilities_cost_their_table_entries_and_the_full_choice_costs_1():
    cost_LE = torch.tensor([[0.2, 0.5, 1.0], [0.3, 0.4, 1.0]])
    for first in range(3):
        for second in range(3):
            prob_LE = torch.eye(3)[[first, second]]
            expected = (cost_LE[0, first] + cost_LE[1, second]) / 2
            torch.testing.assert_close(expected_cost(prob_LE, cost_LE), expected)
    assert expected_cost(torch.eye(3)[[2, 2]], cost_LE) == 1


def test_cost_is_expected_over_levels_and_not_taken_at_the_mean_width():
    # Half the time 1 block at 0.25, half the time 4 at 1: the mean width, 2.5 blocks, would cost something else.
    cost_LE = torch.tensor([[0.25, 0.4, 1.0]])
    assert expected_cost(torch.tensor([[0.5, 0.0, 0.5]]), cost_LE).item() == pytest.approx(0.625)


def test_levels_that_cost_the_same_give_the_logits_no_gradient():
    logits_LE = torch.randn(3, 4, requires_grad=True)
    expected_cost(logits_LE.softmax(dim=1), torch.ones(3, 4)).backward()
    torch.testing.assert_close(logits_LE.grad, torch.zeros(3, 4))
    expected_cost(logits_LE.softmax(dim=1), torch.rand(3, 4)).backward()
    assert logits_LE.grad.abs().sum() > 0


def test_a_table_gives_shares_of_the_full_width(tmp_path):
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    table = read_latency_table(tmp_path / "table.json")
    assert isinstance(table, LatencyTable)
    assert to_plain(table, LatencyTable) == TABLE
    torch.testing.assert_close(table.share_E((1, 2, 4), dim=16, width=48), torch.tensor([0.25, 0.4, 1.0]))
    torch.testing.assert_close(table.share_E((2, 4), dim=16, width=48), torch.tensor([0.4, 1.0]))


@pytest.mark.parametrize(
    ("levels", "sizes", "message"),
    [
        ((1, 3, 4), {"dim": 16, "width": 48}, r"lacks levels of \[3\] blocks"),
        ((1, 2, 4), {"dim": 8, "width": 48}, "D=16, F=48 in 4 blocks, but the model has D=8"),
        ((1, 2, 4, 8), {"dim": 16, "width": 48}, "but the model has D=16, F=48 in 8"),
    ],
)
def test_another_shape_or_level_is_refused(tmp_path, levels, sizes, message):
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    with pytest.raises(ValueError, match=message):
        read_latency_table(tmp_path / "table.json").share_E(levels, **sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ms_X": [1.0]}, "blocks_X has 3 entries, but ms_X has 1"),
        ({"ms_X": [0.0, 1.0, 2.0]}, "must be positive"),
        ({"blocks_X": [1, 2, 3]}, "lacks the full width"),
        ({"ms": [1.0]}, "ms"),
    ],
)
def test_a_damaged_table_says_what_is_wrong(tmp_path, changes, message):
    (tmp_path / "table.json").write_text(json.dumps({**TABLE, **changes}))
    with pytest.raises(ConfigError, match=message):
        read_latency_table(tmp_path / "table.json")


def test_a_missing_table_says_how_to_make_it(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json cannot be read.*level_latency\.py"):
        read_latency_table(tmp_path / "none.json")
