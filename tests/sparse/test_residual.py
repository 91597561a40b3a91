"""The residual stream seen by hooks: what is captured plus the FFN's output is what the decoder layer returns."""

import pytest
import torch
from methods.toy import ids_NC, toy_conversion
from toys import tiny_model

from moesaic.methods.base import SparseMethod
from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.partition import Contiguous
from moesaic.sparse.residual import capture_residuals, residual_norms
from moesaic.sparse.score import RandomScore
from moesaic.sparse.select import Prefix

METHOD = SparseMethod(
    name="prefix",
    partition=Contiguous(num_blocks=4),
    score=None,
    select=Prefix(k=4),
    combine=Combine(),
    oracle=RandomScore(),
    adapt_each_budget=False,
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_the_stream_plus_the_output_is_the_next_layers_stream(tmp_path, family):
    _, model, _ = toy_conversion(METHOD, tmp_path, family=family)
    batch = {"input_ids": ids_NC()}
    norms = residual_norms(model, batch)
    streams: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    layers = sparse_layers(model)
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda _m, _a, y, index=index: outputs.update({index: y.reshape(-1, y.shape[-1])}))
    with torch.no_grad(), capture_residuals(norms, streams):
        states = model(**batch, output_hidden_states=True).hidden_states
    dim = states[0].shape[-1]
    torch.testing.assert_close(streams[0] + outputs[0], states[1].reshape(-1, dim))


def test_hooks_are_gone_afterwards(tmp_path):
    _, model, _ = toy_conversion(METHOD, tmp_path)
    residual_norms(model, {"input_ids": ids_NC()})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_another_kind_of_residual_is_refused(tmp_path, family):
    _, model, _ = toy_conversion(METHOD, tmp_path, family=family)
    assert tiny_model(family).config.model_type == family
    with pytest.raises(ValueError, match=r"resid_cos: .* something else.*Use rel_mse"):
        residual_norms(model, {"input_ids": ids_NC()})
