"""ReLU-fication swaps the activation for good, drops the intermediate bias and trains the rest."""

import pytest
import torch
from methods.toy import ids_NC, toy_job
from toys import tiny_model
from transformers import AutoModelForCausalLM

from moesaic.ffn.sites import find_ffns
from moesaic.methods.relufy import Relufy, with_activation
from moesaic.training.fit import FitConfig

FIT = FitConfig(steps=4, batch_size=4, lr=1e-3)


@pytest.mark.parametrize("family", ["bert", "roberta_classifier", "t5_gated"])
def test_encoders_and_decoders_keep_the_swap_too(tmp_path, family):
    model = with_activation(tiny_model(family), "relu")
    model.save_pretrained(tmp_path)
    for one in (model, type(model).from_pretrained(tmp_path)):
        assert {site.read().activation for site in find_ffns(one)} == {"relu"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma"])
def test_the_swap_is_in_the_modules_and_survives_saving(tmp_path, family):
    model = with_activation(tiny_model(family), "relu")
    assert {site.read().activation for site in find_ffns(model)} == {"relu"}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids_NC()).logits, model.eval()(ids_NC()).logits)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bert"])
def test_intermediate_biases_are_zero_and_stay_zero(tmp_path, family):
    job = toy_job(tiny_model(family), None, tmp_path)
    facts = Relufy(fit=FIT).run(job)
    assert facts["steps"] == 4
    for site in find_ffns(job.model):
        assert not site.read().up_bias_F.any()
        assert site.read().down_bias_D is not None


def test_a_relu_model_is_left_as_it_is(tmp_path):
    job = toy_job(tiny_model("opt"), None, tmp_path)
    before = job.model
    assert Relufy(fit=FIT).run(job)["steps"] == 0
    assert job.model is before
