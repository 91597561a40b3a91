"""levels.png shows what it is given: a bar for each layer and level, a line for each quarter of the tokens."""

import pytest

from moesaic.report.levels_figure import draw_levels

FACTS = {
    "base_labels_LE_by_theta": {"0.9": [[0.0, 0.0, 1.0], [0.0, 0.5, 0.5]], "0.5": [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]},
    "labels_LE": [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]],
    "levels_LE": [[0.6, 0.4, 0.0], [0.0, 0.2, 0.8]],
    "router_top1_L": [0.7, 0.9],
    "router_within_one_L": [0.9, 1.0],
    "router_prior_L": [0.5, 0.8],
    "share_by_loss_quartile_LQ": [[0.2, 0.3, 0.4, 0.5], [0.9, 0.8, 0.7, 0.6]],
}


def test_bars_and_lines_are_the_numbers():
    base, labels, levels, accuracy, difficulty, _ = draw_levels(FACTS, "toy").axes
    assert [line.get_ydata().tolist() for line in base.lines] == [[1.0, 1.5], [3.0, 2.5]]  # theta 0.5, then 0.9
    for axes, key in ((labels, "labels_LE"), (levels, "levels_LE")):
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == pytest.approx([row[level] for level in range(3) for row in FACTS[key]])
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [
        FACTS[f"router_{name}_L"] for name in ("top1", "within_one", "prior")
    ]
    assert [line.get_ydata().tolist() for line in difficulty.lines] == [
        [row[quarter] for row in FACTS["share_by_loss_quartile_LQ"]] for quarter in range(4)
    ]


def test_without_losses_the_panel_says_why():
    *_, difficulty, _ = draw_levels({**FACTS, "share_by_loss_quartile_LQ": None}, "toy").axes
    assert "causal language models only" in difficulty.texts[0].get_text()


def test_facts_of_another_phase_are_refused():
    with pytest.raises(KeyError, match="labels_LE_by_theta"):
        draw_levels({"tokens": 1}, "toy")
