"""Input-channel masks: what they keep, where they end up in a model, how they are counted and saved."""

import pytest
import torch
from toys import tiny_model
from transformers import AutoModelForCausalLM

from moesaic.ffn.sites import find_ffns
from moesaic.sparse.channels import ChannelGate, ChannelMasks, count_channels, install_masks
from moesaic.sparse.executors import masked
from moesaic.sparse.experts import Experts
from moesaic.sparse.model import load_model, mask_channels
from moesaic.sparse.routing import Routing

IDS = torch.arange(24).view(2, 12)


def test_a_gate_keeps_what_exceeds_its_threshold_and_the_first_tokens():
    x = torch.tensor([[0.5, -0.5, 0.6, -0.7], [0.1, 2.0, 0.0, -0.5], [0.4, 0.4, 0.4, 0.6]])
    assert ChannelGate(0.5, 0.0)(x).tolist() == [[0, 0, x[0, 2], x[0, 3]], [0, 2, 0, 0], [0, 0, 0, x[2, 3]]]
    kept = ChannelGate(0.5, 0.34)(x)  # two of three tokens, rounded up
    assert torch.equal(kept[:2], x[:2])
    assert kept[2].tolist() == [0, 0, 0, x[2, 3]]
    assert ChannelGate(0.5, 0.34)(x[:1])[0, 0] == 0  # one token alone is decoding
    assert torch.equal(ChannelGate(0.0, 0.0)(x), x)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mask_at_the_input_of_down_is_a_neuron_mask(family):
    dense = tiny_model(family)
    site = find_ffns(dense)[0]
    name, ffn, threshold = f"{site.name}.{site.pattern.linears['down']}", site.read(), 0.05
    x_TD = torch.randn(7, ffn.dim, generator=torch.Generator().manual_seed(0))
    h_TF = ffn.hidden(x_TD)
    experts = Experts.from_dense(ffn, torch.arange(ffn.width))
    expected = masked(x_TD, experts, Routing.from_mask(h_TF.abs() > threshold))
    if ffn.down_bias_D is not None:
        expected = expected + ffn.down_bias_D
    model = mask_channels(dense, ChannelMasks(threshold={name: threshold}))
    torch.testing.assert_close(model.get_submodule(site.name)(x_TD), expected)


def test_masks_are_counted_saved_and_loaded(tmp_path):
    model = tiny_model("llama")
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    before = tiny_model("llama")(IDS).logits
    masks = ChannelMasks(threshold={names[0]: 0.0, names[1]: 0.01}, dense_prefix_frac=0.1)
    mask_channels(model, masks)
    with count_channels(model) as counts:
        logits = model(IDS).logits
    share = counts.active_frac()
    assert share[names[0]] == 1
    assert 0 < share[names[1]] < 1
    assert not torch.equal(logits, before)
    model.save_pretrained(tmp_path)
    for loaded in (load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)):
        assert torch.equal(loaded(IDS).logits, logits)


def test_masks_that_are_off_leave_the_model_as_it_was():
    model, dense = tiny_model("llama"), tiny_model("llama")
    install_masks(model, ChannelMasks(threshold={"model.layers.0.mlp.up_proj": 0.0}))
    assert torch.equal(model(IDS).logits, dense(IDS).logits)
    assert model.state_dict().keys() == dense.state_dict().keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": {"a": -1.0}}, "threshold of a is -1"),
        ({"dense_prefix_frac": 1.5}, r"dense_prefix_frac=1\.5 is outside 0\.\.1"),
    ],
)
def test_impossible_masks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ChannelMasks(**settings)
