"""CMoE's carving: markers and distances against loops, planted clusters, and a router that is a formula."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor
from toy_ffns import random_ffn, random_inputs
from transformers.activations import ACT2FN

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.experts import Experts
from moesaic.sparse.markers import (
    CoreNeuron,
    Markers,
    activation_markers,
    balanced_clusters,
    core_neurons,
    marker_distances,
)
from moesaic.sparse.stats import NeuronStats

CLUSTERS, SIZE, DIM = 4, 3, 8


def planted_ffn(*, shared: int = 0) -> DenseFFN:
    """Neuron i reads direction i % 4, so that neurons fire in four groups; the last `shared` read all four at once."""
    up_FD = torch.zeros(CLUSTERS * SIZE + shared, DIM)
    for neuron in range(CLUSTERS * SIZE):
        up_FD[neuron, neuron % CLUSTERS] = 1.0 + neuron
    up_FD[CLUSTERS * SIZE :, :CLUSTERS] = 1.0
    return DenseFFN(gate_FD=None, up_FD=up_FD, down_FD=torch.zeros_like(up_FD), activation="relu")


def planted_inputs(per_cluster: int = 5) -> Tensor:
    """Tokens of one direction each, equally many of all four, with lengths that must not matter."""
    directions_TD = torch.eye(CLUSTERS, DIM).repeat(per_cluster, 1)
    return directions_TD * torch.linspace(0.1, 9.0, len(directions_TD))[:, None]


def cut(partition: Markers, ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    return partition.labels(ffn, NeuronStats(ffn, x_TD), generator=Generator())


@pytest.mark.parametrize("ffn", [random_ffn(), random_ffn(gated=False)])
def test_markers_against_a_loop(ffn) -> None:
    x_TD = random_inputs(7)
    marker_TF = activation_markers(ffn, x_TD, 5)
    for t in range(7):
        x_D = x_TD[t] / x_TD[t].norm()
        h = []
        for i in range(ffn.width):
            up = (ffn.up_FD[i] / ffn.up_FD[i].norm()) @ x_D
            if ffn.gate_FD is None:
                h.append(ACT2FN["relu"](up))
            else:
                h.append(ACT2FN["silu"]((ffn.gate_FD[i] / ffn.gate_FD[i].norm()) @ x_D) * up)
        assert set(marker_TF[t].nonzero().flatten().tolist()) == set(torch.stack(h).abs().topk(5).indices.tolist())


def test_marker_distances_against_a_loop() -> None:
    marker_TM = random_inputs(9, dim=6) > 0
    centroid_TC = torch.rand(9, 2, generator=Generator().manual_seed(0))
    distance_MC = marker_distances(marker_TM, centroid_TC)
    for m in range(6):
        for c in range(2):
            wanted = sum(abs(float(marker_TM[t, m]) - centroid_TC[t, c].item()) for t in range(9))
            assert distance_MC[m, c].item() == pytest.approx(wanted, abs=1e-5)


def test_planted_groups_are_recovered() -> None:
    block_F = cut(Markers(num_blocks=CLUSTERS, markers_per_token=SIZE), planted_ffn(), planted_inputs())
    groups = {tuple(group.tolist()) for group in block_F.view(SIZE, CLUSTERS).mT}
    assert sorted(groups) == [(b, b, b) for b in range(CLUSTERS)]


def test_neurons_that_every_token_marks_are_shared() -> None:
    partition = Markers(num_blocks=CLUSTERS + 1, shared=1, markers_per_token=2 * SIZE)
    block_F = cut(partition, planted_ffn(shared=SIZE), planted_inputs())
    assert block_F[-SIZE:].tolist() == [0] * SIZE
    routed = block_F[:-SIZE].view(SIZE, CLUSTERS)
    assert (routed == routed[0]).all()
    assert sorted(routed[0].tolist()) == [1, 2, 3, 4]


@pytest.mark.parametrize("shared", [0, 1, 2, 5])
@pytest.mark.parametrize("ffn", [random_ffn(), random_ffn(gated=False)])
def test_groups_are_exact_and_the_shared_ones_have_the_top_rates(ffn, shared) -> None:
    x_TD = random_inputs(64)
    block_F = cut(Markers(num_blocks=6, shared=shared, markers_per_token=5), ffn, x_TD)
    assert torch.bincount(block_F).tolist() == [4] * 6
    rate_F = activation_markers(ffn, x_TD, 5).float().mean(0)
    if shared:
        assert rate_F[block_F < shared].min() >= rate_F[block_F >= shared].max()


def test_no_other_equal_clusters_are_nearer_to_the_first_neurons() -> None:
    marker_TM = random_inputs(12, dim=6, seed=3) > 0.3
    cluster_M = balanced_clusters(marker_TM, 2)
    distance_MC = marker_distances(marker_TM, marker_TM[:, :2])
    found = distance_MC.gather(1, cluster_M[:, None]).sum()
    every = torch.cartesian_prod(*[torch.arange(2)] * 6)
    equal = every[every.sum(1) == 3]
    assert len(equal) == 20
    assert found == min(distance_MC.gather(1, clusters[:, None]).sum() for clusters in equal)


def test_core_neurons_against_a_loop() -> None:
    marker_TBS = (random_inputs(40, dim=12) > 0.5).unflatten(1, (3, 4))
    for b, core in enumerate(core_neurons(marker_TBS).tolist()):
        mean_T = marker_TBS[:, b].float().mean(1)
        distances = [(marker_TBS[:, b, s].float() - mean_T).abs().sum().item() for s in range(4)]
        assert core == 4 * b + distances.index(min(distances))


@pytest.mark.parametrize("ffn", [random_ffn(), random_ffn(gated=False)])
def test_the_router_is_the_core_neuron_with_rows_of_length_one(ffn) -> None:
    x_TD = random_inputs(30)
    block_F = cut(Markers(num_blocks=6, markers_per_token=5), ffn, x_TD)
    experts = Experts.from_dense(ffn, block_F)
    score = CoreNeuron(markers_per_token=5).build(DIM, 6)
    score.initialise(experts, x_TD, generator=Generator())
    core_B = core_neurons(activation_markers(experts.dense_ffn(), x_TD, 5).unflatten(1, (6, 4)))
    for b, neuron in enumerate(experts.neuron_F[core_B].tolist()):
        assert block_F[neuron] == b
        h_T = x_TD @ ffn.up_FD[neuron] / ffn.up_FD[neuron].norm()
        if ffn.gate_FD is None:
            h_T = ACT2FN["relu"](h_T)
        else:
            h_T = ACT2FN["silu"](x_TD @ ffn.gate_FD[neuron] / ffn.gate_FD[neuron].norm()) * h_T
        torch.testing.assert_close(score(x_TD, experts)[:, b], h_T.abs(), atol=1e-6, rtol=1e-5)


def test_the_router_is_float32_for_half_precision_inputs() -> None:
    ffn, x_TD = random_ffn(), random_inputs(30)
    experts = Experts.from_dense(ffn, cut(Markers(num_blocks=6), ffn, x_TD))
    score = CoreNeuron().build(DIM, 6)
    score.initialise(experts, x_TD, generator=Generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score(x_TD.bfloat16(), experts), score(x_TD.bfloat16().float(), experts))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Markers(num_blocks=4, shared=4), r"shared=4 is outside 0\.\.3.*num_blocks=4"),
        (lambda: Markers(num_blocks=4, shared=-1), r"shared=-1 is outside 0\.\.3"),
        (lambda: Markers(num_blocks=0), r"num_blocks=0 is below 1"),
        (lambda: Markers(num_blocks=4, markers_per_token=0), r"markers_per_token=0 is below 1"),
        (lambda: CoreNeuron(markers_per_token=0), r"markers_per_token=0 is below 1"),
    ],
)
def test_what_cannot_be_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_calibration_is_said() -> None:
    ffn = random_ffn()
    with pytest.raises(ValueError, match="Markers needs calibration inputs"):
        Markers(num_blocks=6).labels(ffn, None, generator=Generator())
    experts = Experts.from_dense(ffn, torch.arange(24) // 4)
    with pytest.raises(ValueError, match="CoreNeuron needs calibration inputs"):
        CoreNeuron().build(DIM, 6).initialise(experts, None, generator=Generator())
