"""Calibration keeps exactly what each FFN of the dense model is given."""

import pytest
import torch
from methods.toy import toy_calibration
from toys import CAUSAL_FAMILIES, tiny_model

from moesaic.ffn.sites import capture_inputs, find_ffns
from moesaic.methods.calibration import output_gradients


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_cached_inputs_are_what_the_ffns_see(tmp_path, family):
    model = tiny_model(family)
    calibration = toy_calibration(model, tmp_path, num_tokens=128)
    seen: dict[int, torch.Tensor] = {}
    sites = find_ffns(model)
    with torch.no_grad(), capture_inputs(sites, seen.__setitem__):
        model(calibration.windows_NC())
    assert calibration.num_layers == len(sites)
    for index in range(len(sites)):
        torch.testing.assert_close(calibration.inputs_TD(index), seen[index].reshape(128, -1), atol=1e-5, rtol=1e-4)
    assert calibration.window_T().tolist() == [row for row in range(8) for _ in range(16)]


@pytest.mark.parametrize("num_tokens", [8, 10_000])
def test_more_tokens_than_there_are_is_refused(tmp_path, num_tokens):
    with pytest.raises(ValueError, match=rf"calibration_tokens={num_tokens} needs .* Ask for 16\.\.2048 tokens"):
        toy_calibration(tiny_model("llama"), tmp_path, num_tokens=num_tokens)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_output_gradients_are_those_of_the_summed_loss_of_the_windows(tmp_path, family):
    """dL/ddown = h^T dL/dy over all windows, whatever the batches; no parameter keeps a gradient."""
    model = tiny_model(family)
    calibration = toy_calibration(model, tmp_path, num_tokens=160)
    sites = find_ffns(model)
    gradients = output_gradients(model, sites, calibration, batch_size=4)
    assert all(parameter.grad is None for parameter in model.parameters())
    ids_NC = calibration.windows_NC()
    (model(ids_NC, labels=ids_NC).loss * len(ids_NC)).backward()
    for site, gradient_TD in zip(sites, gradients, strict=True):
        h_TF, weight = site.read().hidden(calibration.inputs_TD(site.index)), site.down_module.weight
        down_grad_FD = weight.grad if weight.shape == site.read().down_FD.shape else weight.grad.mT
        torch.testing.assert_close(h_TF.mT @ gradient_TD, down_grad_FD, rtol=1e-3, atol=1e-5)
