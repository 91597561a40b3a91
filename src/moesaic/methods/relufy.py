"""ReLU-fication: the dense model with its FFN activation swapped for ReLU, trained on until it works again.

Source: arXiv:2110.01786 sec. 4.3; the swap is a change to the dense model, so gaps are reported against both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from moesaic.ffn.sites import find_ffns
from moesaic.methods.base import AdaptJob, Prepare
from moesaic.methods.lm import LanguageModelling, fit_language_model, train_only
from moesaic.training.fit import FitConfig

__all__ = ["Relufy", "set_activation"]

CONFIG_KEYS = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "feed_forward_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Relufy(Prepare):
    """Swap the activation for ReLU, drop the intermediate bias, continue language-model training of all weights."""

    fit: FitConfig

    def run(self, job: AdaptJob) -> dict[str, Any]:
        set_activation(job.model, "relu")
        drop_intermediate_bias(job)
        parameters = train_only(job.model, ("all",), job.pattern)
        biases = {id(p) for site in find_ffns(job.model, job.pattern) for p in site.intermediate_biases()}
        trained = [p for p in parameters if id(p) not in biases]
        return fit_language_model(LanguageModelling(job.model, trained, self.fit), job, self.fit, label=job.label)


def set_activation(model: PreTrainedModel, name: str) -> None:
    """Make `name` the activation of every FFN of a dense model, in its modules and in its config.

    Raises ValueError where the family keeps its activation under none of the known config keys.
    """
    keys = [key for key in CONFIG_KEYS if hasattr(model.config, key)]
    if not keys:
        raise ValueError(
            f"{type(model).__name__}: its config names no FFN activation (looked for {', '.join(CONFIG_KEYS)}), so a "
            "ReLU-fied copy could not be saved and loaded again."
        )
    old = {type(ACT2FN[getattr(model.config, key)]) for key in keys if getattr(model.config, key) in ACT2FN}
    for key in keys:
        if getattr(model.config, key) in ACT2FN:
            setattr(model.config, key, name)
    for site in find_ffns(model, None):
        site.set_activation(name)
    assert old, "config keys without a known activation"


@torch.no_grad()
def drop_intermediate_bias(job: AdaptJob) -> None:
    """Set the biases of the hidden units to zero; they stay zero because they are not trained."""
    for site in find_ffns(job.model, job.pattern):
        for bias in site.intermediate_biases():
            bias.zero_()
