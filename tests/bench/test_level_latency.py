"""The latency table of levels: what is timed, how it is summarised."""

import itertools

import pytest
import torch

from moesaic.bench.level_latency import measure_levels, random_ffn, sliced
from moesaic.config.strict import strict_object, to_plain
from moesaic.sparse.level_cost import LatencyTable

SIZES = {"dim": 8, "width": 32, "num_blocks": 4, "num_layers": 3, "tokens": 2}


def test_times_are_ratios_to_the_full_width_in_turns():
    # A clock that gives each arm of a round its own time: 1, 2 and 5 ms, then twice as much, as if the machine slowed.
    calls = itertools.count()

    def clock() -> float:
        number = next(calls)
        if number == 0:
            return 0.0  # the beginning
        arm, is_end = divmod((number - 1) % 6, 2)
        slow = 1 + (number - 1) // 6 % 2
        return (0.001, 0.002, 0.005)[arm] * slow * is_end

    table = measure_levels(**SIZES, blocks_X=(1, 2, 4), rounds=6, clock=clock)
    assert [ms / table.ms_X[-1] for ms in table.ms_X] == pytest.approx([0.2, 0.4, 1.0])
    assert table.ms_X[-1] == pytest.approx(5.0 * 1.5 / 3)  # the median round, per layer
    assert (table.blocks_X, table.num_blocks, table.dim, table.width) == ((1, 2, 4), 4, 8, 32)


def test_a_real_measurement_is_a_table_that_reads_back():
    table = measure_levels(**SIZES, blocks_X=(1, 4), rounds=5, gated=False, activation="relu")
    assert all(ms > 0 for ms in table.ms_X)
    assert strict_object(LatencyTable, to_plain(table, LatencyTable)) == table


@pytest.mark.parametrize("gated", [True, False])
def test_a_slice_is_the_ffn_with_its_other_neurons_silent(gated):
    ffn = random_ffn(8, 32, "relu", gated=gated, dtype=torch.float32, device=torch.device("cpu"))
    x_TD = torch.randn(5, 8)
    silenced_TF = ffn.hidden(x_TD).clone()
    silenced_TF[:, 24:] = 0
    torch.testing.assert_close(sliced(ffn, 24)(x_TD), silenced_TF @ ffn.down_FD)


@pytest.mark.parametrize("blocks", [(1, 2), (0, 4), (4, 5)])
def test_widths_that_do_not_fit_are_refused(blocks):
    with pytest.raises(ValueError, match=r"must lie within 1\.\.num_blocks=4, the last included"):
        measure_levels(**SIZES, blocks_X=blocks)
