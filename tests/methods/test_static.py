"""The static front: slices and dropped layers against what they must compute."""

import pytest
import torch
from methods.toy import CONTEXT, ids_NC, toy_calibration, toy_conversion
from toys import tiny_model

from moesaic.ffn.sites import find_ffns
from moesaic.methods.static import StaticDepth, StaticSlice, block_influence, decoder_layers, slice_ffn


@pytest.fixture
def ffn_and_inputs(tmp_path):
    model = tiny_model("llama")
    return find_ffns(model)[0].read(), toy_calibration(model, tmp_path).inputs_TD(0)


def test_a_slice_of_full_width_is_the_dense_ffn(ffn_and_inputs):
    ffn, x_TD = ffn_and_inputs
    torch.testing.assert_close(slice_ffn(ffn, x_TD, ffn.width)(x_TD), ffn(x_TD))


def test_a_slice_keeps_the_mean_output_of_the_dense_ffn(ffn_and_inputs):
    ffn, x_TD = ffn_and_inputs
    sliced = slice_ffn(ffn, x_TD, ffn.width // 4)
    assert sliced.width == ffn.width // 4
    torch.testing.assert_close(sliced(x_TD).mean(0), ffn(x_TD).mean(0), atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_a_slice_keeps_the_neurons_that_add_most(ffn_and_inputs):
    ffn, x_TD = ffn_and_inputs
    size_F = [float((ffn.hidden(x_TD)[:, i : i + 1] * ffn.down_FD[i]).norm(dim=1).mean()) for i in range(ffn.width)]
    best = sorted(range(ffn.width), key=lambda i: -size_F[i])[:4]
    kept = slice_ffn(ffn, x_TD, 4).up_FD
    assert {tuple(row.tolist()) for row in kept} == {tuple(ffn.up_FD[i].tolist()) for i in best}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_static_slice_with_all_blocks_is_the_dense_model(tmp_path, family):
    method = StaticSlice(name="static_slice", num_blocks=4, budgets=(4,), calibration_tokens=512)
    dense, sliced, _ = toy_conversion(method, tmp_path, family=family, budget=4)
    torch.testing.assert_close(sliced(ids_NC()).logits, dense(ids_NC()).logits, atol=1e-5, rtol=1e-5)


def test_static_depth_drops_the_least_influential_layer_and_still_generates(tmp_path):
    method = StaticDepth(name="static_depth", budgets=(1,), calibration_tokens=256)
    dense, shallow, calibration = toy_conversion(method, tmp_path, budget=1)
    influence = block_influence(dense, decoder_layers(dense), calibration)
    kept = int(influence.argmax())
    assert shallow.config.num_hidden_layers == 1
    torch.testing.assert_close(
        decoder_layers(shallow)[0].self_attn.q_proj.weight, decoder_layers(dense)[kept].self_attn.q_proj.weight
    )
    text = shallow.generate(ids_NC(1)[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    again = shallow.generate(ids_NC(1)[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert text.tolist() == again.tolist()


@pytest.mark.parametrize(("budget", "message"), [(0, "not a whole number in 1..num_blocks=4"), (5, "1..num_blocks=4")])
def test_static_slice_refuses_budgets_it_cannot_keep(budget, message):
    with pytest.raises(ValueError, match=message):
        StaticSlice(name="static_slice", num_blocks=4, budgets=(budget,))


def test_static_depth_refuses_more_layers_than_there_are(tmp_path):
    method = StaticDepth(name="static_depth", budgets=(9,), calibration_tokens=4 * CONTEXT)
    with pytest.raises(ValueError, match=r"9 layers kept, but the model has 2"):
        toy_conversion(method, tmp_path, budget=9)
