"""ReLU-fication: the dense model with its FFN activation swapped for ReLU, trained on until it works again.

Source: arXiv:2110.01786 sec. 4.3; the swap is a change to the dense model, so gaps are reported against both.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import find_ffns
from moesaic.methods.base import AdaptJob, Prepare
from moesaic.methods.lm import LanguageModelling, fit_language_model, train_only
from moesaic.training.fit import FitConfig

__all__ = ["Relufy", "with_activation"]

CONFIG_KEYS = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Relufy(Prepare):
    """Swap the activation for ReLU, drop the intermediate bias, continue language-model training of all weights.

    A model whose FFNs are ReLU already is left as it is.
    """

    fit: FitConfig

    def run(self, job: AdaptJob) -> dict[str, Any]:
        if all(site.read().activation == "relu" for site in find_ffns(job.model, job.pattern)):
            return {"tokens": 0, "steps": 0, "wall_seconds": 0.0, "skipped": "the FFNs are ReLU already"}
        job.model = with_activation(job.model, "relu")
        dropped = drop_intermediate_biases(job.model, job.pattern)
        trained = [p for p in train_only(job.model, ("all",), job.pattern) if p.data_ptr() not in dropped]
        job.model.train()
        return fit_language_model(LanguageModelling(job.model, trained, self.fit), job, self.fit, label=job.label)


def with_activation(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """A copy of a dense model with the FFN activation `name`, in its config too, so that it saves and loads.

    Raises ValueError where the family keeps its activation under none of the known config keys.
    """
    config = copy.deepcopy(model.config)
    keys = [key for key in CONFIG_KEYS if getattr(config, key, None) in ACT2FN]
    if not keys:
        raise ValueError(
            f"{type(model).__name__}: its config names no FFN activation (looked for {', '.join(CONFIG_KEYS)}), so a "
            "ReLU-fied copy could not be saved and loaded again."
        )
    for key in keys:
        setattr(config, key, name)
    return type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=model.dtype)


@torch.no_grad()
def drop_intermediate_biases(model: PreTrainedModel, pattern: FFNPattern | None) -> set[int]:
    """Set the biases of the hidden units to zero; the addresses of their parameters, which must not be trained."""
    dropped = set()
    for site in find_ffns(model, pattern):
        ffn = site.read()
        for bias_F in (ffn.gate_bias_F, ffn.up_bias_F):
            if bias_F is not None:
                bias_F.zero_()
                dropped.add(bias_F.data_ptr())
    return dropped
