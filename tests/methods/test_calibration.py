"""Calibration keeps exactly what each FFN of the dense model is given."""

import pytest
import torch
from methods.toy import toy_calibration
from toys import CAUSAL_FAMILIES, tiny_model

from moesaic.ffn.sites import capture_inputs, find_ffns


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
