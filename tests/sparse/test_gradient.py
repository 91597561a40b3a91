"""Gradient partitions: importance by finite differences, the greedy filling, always-on blocks, refusals."""

import pytest
import torch
from torch import Generator, Tensor
from toy_ffns import random_ffn, random_inputs

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.gradient import Gradient, greedy_blocks, shared_neurons, window_clusters
from moesaic.sparse.stats import NeuronStats

FFN = random_ffn(width=24)


def generator() -> Generator:
    return torch.Generator().manual_seed(0)


def stats_of(ffn: DenseFFN, num_windows: int = 6) -> NeuronStats:
    x_TD = random_inputs(num_windows * 5)
    gradient_TD = torch.randn(x_TD.shape, generator=generator())
    return NeuronStats(ffn, x_TD, torch.arange(num_windows).repeat_interleave(5), gradient_TD)


@pytest.mark.parametrize("chunk", [4096, 7])
def test_importance_is_what_the_loss_loses_without_the_neuron(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a loss that is linear in the output, |h dL/dh| is exactly the change when the neuron's h becomes 0."""
    monkeypatch.setattr("moesaic.sparse.stats._CHUNK_TOKENS", chunk)
    stats, group_T = stats_of(FFN), torch.arange(30) % 3
    found_CF = stats.gradient_importance(group_T, 4)
    h_TF = FFN.hidden(stats.x_TD)
    for neuron in (0, 11, 23):
        without_TF = h_TF.clone()
        without_TF[:, neuron] = 0
        change_T = (((h_TF - without_TF) @ FFN.down_FD) * stats.gradient_TD).sum(1).abs()
        for group in range(3):
            assert found_CF[group, neuron].item() == pytest.approx(change_T[group_T == group].mean().item(), rel=1e-4)
    assert (found_CF[3] == 0).all()


def test_greedy_filling_by_hand() -> None:
    importance_CF = torch.tensor([[9.0, 8.0, 7.0, 1.0], [8.5, 2.0, 6.0, 0.0]])
    # 9: neuron 0 to cluster 0; 8: 1 to 0, which is full; 6: 2 to 1; 0: 3 to 1.
    assert greedy_blocks(importance_CF).tolist() == [0, 0, 1, 1]


def test_greedy_filling_against_repeated_search() -> None:
    importance_CF = torch.rand(4, 20, generator=generator())
    remaining_CF, room, expected = importance_CF.clone(), [5] * 4, [-1] * 20
    for _ in range(20):
        for cluster in range(4):
            if not room[cluster]:
                remaining_CF[cluster] = -1.0
        cluster, neuron = divmod(int(remaining_CF.argmax()), 20)
        expected[neuron] = cluster
        room[cluster] -= 1
        remaining_CF[:, neuron] = -1.0
    assert greedy_blocks(importance_CF).tolist() == expected


def test_shared_neurons_matter_to_every_cluster_whatever_its_scale() -> None:
    importance_CF = torch.tensor([[5.0, 0.0, 4.0, 1.0], [0.0, 50.0, 30.0, 20.0]])
    assert shared_neurons(importance_CF, 2).tolist() == [2, 3]
    assert shared_neurons(importance_CF, 0).tolist() == []


@pytest.mark.parametrize("always", [0, 2])
def test_the_cut_is_a_partition_and_repeats(always: int) -> None:
    partition, stats = Gradient(num_blocks=6, always=always), stats_of(FFN)
    block_F = partition.labels(FFN, stats, generator=generator())
    assert torch.bincount(block_F).tolist() == [4] * 6
    assert torch.equal(block_F, partition.labels(FFN, stats, generator=generator()))


def test_always_on_blocks_hold_the_shared_neurons() -> None:
    stats = stats_of(FFN)
    block_F = Gradient(num_blocks=6, always=2).labels(FFN, stats, generator=generator())
    cluster_T = window_clusters(stats.x_TD, stats.window_T, 4, generator=generator())
    expected = shared_neurons(stats.gradient_importance(cluster_T, 4), 8)
    assert set((block_F < 2).nonzero()[:, 0].tolist()) == set(expected.tolist())
    assert block_F[expected].tolist() == [0] * 4 + [1] * 4


def test_windows_of_one_kind_are_one_cluster() -> None:
    centre_CD = torch.tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, -10.0]])
    kind_W = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    window_T = torch.arange(7).repeat_interleave(4)
    x_TD: Tensor = centre_CD[kind_W[window_T]] + torch.randn(28, 2, generator=generator())
    cluster_T = window_clusters(x_TD, window_T, 3, generator=generator())
    pairs = {(int(kind), int(cluster)) for kind, cluster in zip(kind_W[window_T], cluster_T, strict=True)}
    assert len(pairs) == 3


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"partition\.always=6 leaves no block to route to \(allowed: 0\.\.5\)"):
        Gradient(num_blocks=6, always=6)
    with pytest.raises(ValueError, match="6 calibration windows cannot tell 8 kinds of text apart"):
        Gradient(num_blocks=8).labels(FFN, stats_of(FFN), generator=generator())
    with pytest.raises(ValueError, match=r"Gradient needs the loss gradient.*_target_=.*llama_moe\.LlamaMoE"):
        Gradient(num_blocks=6).labels(FFN, NeuronStats(FFN, random_inputs(30)), generator=generator())
    with pytest.raises(ValueError, match="needs calibration inputs"):
        Gradient(num_blocks=6).labels(FFN, None, generator=generator())
