"""CMoE on a toy model: shared experts always run, weights are 1, and all experts together are the dense model."""

from __future__ import annotations

import pytest
import torch
from methods.toy import ids_NC, toy_conversion

from moesaic.methods.base import SparseMethod, select_blocks
from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.markers import CoreNeuron, Markers, activation_markers
from moesaic.sparse.score import Oracle
from moesaic.sparse.select import TopK
from moesaic.sparse.trace import record_routing

METHOD = SparseMethod(
    name="cmoe",
    partition=Markers(num_blocks=8, shared=2, markers_per_token=6),
    score=CoreNeuron(markers_per_token=6),
    select=TopK(k=4, always=2),
    combine=Combine(),
    oracle=Oracle(target="output_norm"),
    adapt_each_budget=True,
    calibration_tokens=512,
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_every_expert_on_is_dense(tmp_path, family):
    dense, model, _ = toy_conversion(METHOD, tmp_path, family=family)
    select_blocks(model, TopK(k=8, always=2))
    torch.testing.assert_close(model(ids_NC()).logits, dense(ids_NC()).logits, atol=1e-5, rtol=1e-4)


def test_shared_experts_run_for_every_token_beside_the_best_routed_ones_all_with_weight_one(tmp_path):
    _, model, _ = toy_conversion(METHOD, tmp_path)
    select_blocks(model, METHOD.select)
    with record_routing(model) as trace:
        model(ids_NC())
    for records in trace.layers:
        routing, score_TB = records[0].routing, records[0].score_TB
        active_TB = routing.active_TB()
        assert (routing.weight_N == 1).all()
        assert active_TB[:, :2].all()
        assert (active_TB.sum(1) == 4).all()
        best_TK = 2 + score_TB[:, 2:].topk(2, dim=1).indices
        assert active_TB.gather(1, best_TK).all()


def test_shared_neurons_are_those_that_calibration_marks_most(tmp_path):
    _, model, calibration = toy_conversion(METHOD, tmp_path)
    for index, layer in enumerate(sparse_layers(model)):
        assert sorted(layer.experts.neuron_F.tolist()) == list(range(48))
        marker_TF = activation_markers(layer.experts.dense_ffn(), calibration.inputs_TD(index), 6)
        rate_F = marker_TF.float().mean(0)
        assert rate_F[:12].min() >= rate_F[12:].max()
