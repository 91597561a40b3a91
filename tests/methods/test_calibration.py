"""Calibration keeps exactly what each FFN of the dense model is given."""

import numpy as np
import pytest
import torch
from methods.toy import toy_calibration
from toys import CAUSAL_FAMILIES, TOY_VOCAB, tiny_model

from moesaic.data.objective import forward
from moesaic.data.tokens import TokenDocument, TokenSplit
from moesaic.ffn.sites import capture_inputs, find_ffns
from moesaic.methods.calibration import calibrate, output_gradients


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


@pytest.mark.parametrize(("family", "layers"), [("bert", 2), ("t5", 4)])
def test_encoders_and_decoders_are_calibrated_on_what_they_are_trained_on(tmp_path, family, layers):
    model = tiny_model(family)
    calibration = toy_calibration(model, tmp_path, num_tokens=128)
    seen: dict[int, torch.Tensor] = {}
    batch = calibration.windows(0, calibration.num_windows)
    with torch.no_grad(), capture_inputs(find_ffns(model), seen.__setitem__):
        forward(model, batch)
    assert calibration.num_layers == layers
    for index in range(layers):
        assert len(calibration.inputs_TD(index)) == calibration.num_tokens == 128
        torch.testing.assert_close(calibration.inputs_TD(index), seen[index].reshape(128, -1), atol=1e-5, rtol=1e-4)
    if family == "bert":
        assert (batch["input_ids"] == TOY_VOCAB - 1).sum(dim=1).tolist() == [2] * 8
    else:
        assert batch["input_ids"].shape == batch["labels"].shape == (16, 8)  # half a row in each stack
    assert calibration.window_T().bincount().tolist() == [128 // calibration.num_windows] * calibration.num_windows


def test_padding_is_no_calibration_token(tmp_path):
    lengths = [3, 14, 6, 30, 9, 1]
    documents, first = [], 0
    for number, length in enumerate(lengths):
        documents.append(TokenDocument(str(number), first, length, length, number % 3))
        first += length + 1
    ids = np.arange(first, dtype=np.uint16) % 50 + 3
    split = TokenSplit(tokens_N=ids, documents=tuple(documents), separator_id=2, provenance={}, start_id=1)
    model = tiny_model("roberta_classifier")
    calibration = calibrate(model, split, tmp_path, pattern=None, num_tokens=59, context=16)
    framed = [min(16, length + 2) for length in lengths]
    assert sum(framed) == calibration.num_tokens == 59
    assert calibration.window_T().tolist() == [row for row, length in enumerate(framed) for _ in range(length)]
    sites = find_ffns(model)
    for row, length in enumerate(framed):  # alone and without padding, a document gives the same inputs
        seen: dict[int, torch.Tensor] = {}
        with torch.no_grad(), capture_inputs(sites, seen.__setitem__):
            model(calibration.windows(row, row + 1)["input_ids"][:, :length])
        for index in range(len(sites)):
            own_TD = calibration.inputs_TD(index)[calibration.window_T() == row]
            torch.testing.assert_close(own_TD, seen[index][0], atol=1e-5, rtol=1e-4)
    few = calibrate(model, split, tmp_path, pattern=None, num_tokens=20, context=16)
    assert few.windows_NC().shape == (2, 5)  # the first and the last document, cut to the longer of the two


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
