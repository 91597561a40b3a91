"""A toy backbone, its tokens and its calibration, for every test of a method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from toys import TOY_VOCAB, tiny_model
from transformers import PreTrainedModel

from moesaic.data.tokens import TokenDocument, TokenSplit
from moesaic.methods.base import AdaptJob, ConvertJob, Method
from moesaic.methods.calibration import Calibration, calibrate

CONTEXT = 16


def toy_tokens(num_tokens: int = 2048, vocab: int = 60) -> TokenSplit:
    """Tokens with structure to learn: each follows from the one before it, most of the time."""
    rng = np.random.default_rng(0)
    ids = np.zeros(num_tokens, dtype=np.uint16)
    for i in range(1, num_tokens):
        ids[i] = (ids[i - 1] * 7 + 3) % vocab if rng.random() < 0.8 else rng.integers(vocab)
    document = TokenDocument("toy", 0, num_tokens, num_tokens)
    return TokenSplit(
        tokens_N=ids, documents=(document,), separator_id=0, provenance={"name": "toy"}, mask_id=TOY_VOCAB - 1
    )


def toy_calibration(model: PreTrainedModel, folder: Path, num_tokens: int = 512) -> Calibration:
    folder.mkdir(parents=True, exist_ok=True)
    return calibrate(model, toy_tokens(), folder, pattern=None, num_tokens=num_tokens, context=CONTEXT)


def toy_conversion(
    method: Method, folder: Path, *, family: str = "llama", budget: float | None = None, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedModel, Calibration]:
    """A dense toy, the same one converted by `method`, and the calibration used."""
    calibration = toy_calibration(tiny_model(family), folder / "calibration")
    job = ConvertJob(model=tiny_model(family), pattern=None, calibration=calibration, budget=budget, seed=seed)
    return tiny_model(family), method.convert(job), calibration


def toy_job(model: PreTrainedModel, calibration: Calibration | None, folder: Path, *, seed: int = 0) -> AdaptJob:
    folder.mkdir(parents=True, exist_ok=True)
    return AdaptJob(
        model=model,
        pattern=None,
        calibration=calibration,
        tokens=toy_tokens(),
        context=CONTEXT,
        seed=seed,
        folder=folder,
        label="toy",
    )


def ids_NC(num_sequences: int = 4) -> torch.Tensor:
    return torch.as_tensor(toy_tokens().blocks(CONTEXT)[:num_sequences].astype("int64"))


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
