"""The score-aligned partition: excitation against a loop, and neurons planted for a direction find their block."""

from dataclasses import replace

import pytest
import torch
from toy_ffns import random_ffn, random_inputs

from moesaic.sparse.aligned import ScoreAligned, excitation
from moesaic.sparse.grap import Grap, group_directions
from moesaic.sparse.stats import NeuronStats

GENERATOR = torch.Generator()


def test_excitation_against_a_loop():
    ffn, x_TD = random_ffn(dim=8, width=24), random_inputs(100)
    block_T = torch.randint(0, 3, (100,), generator=torch.Generator().manual_seed(0))
    abs_TF = ffn.hidden(x_TD).abs()
    ratio_FB = excitation(ffn, x_TD, block_T, 4)
    for neuron in range(24):
        for block in range(3):
            expected = abs_TF[block_T == block, neuron].mean() / abs_TF[:, neuron].mean()
            assert ratio_FB[neuron, block].item() == pytest.approx(expected.item(), rel=1e-5)
    assert (ratio_FB[:, 3] == 1).all()  # no token: neither for nor against


@pytest.mark.parametrize("group_map", ["contiguous", "strided", "permutation", "rotation"])
def test_neurons_that_listen_to_a_direction_go_to_its_block(group_map):
    direction_BD = group_directions(16, 4, group_map)
    planted_F = torch.arange(24) % 4
    ffn = random_ffn(dim=16, width=24, gated=False)
    ffn = replace(ffn, up_FD=direction_BD[planted_F] + 0.02 * ffn.up_FD)
    partition = ScoreAligned(num_blocks=4, score=Grap(group_map=group_map))
    block_F = partition.labels(ffn, NeuronStats(ffn, random_inputs(2000, 16)), generator=GENERATOR)
    assert torch.equal(block_F, planted_F)


def test_blocks_are_equal_and_calibration_is_asked_for():
    ffn = random_ffn(dim=8, width=24)
    partition = ScoreAligned(num_blocks=4, score=Grap())
    block_F = partition.labels(ffn, NeuronStats(ffn, random_inputs(200)), generator=GENERATOR)
    assert torch.bincount(block_F).tolist() == [6] * 4
    with pytest.raises(ValueError, match="calibration_tokens"):
        partition.labels(ffn, None, generator=GENERATOR)
