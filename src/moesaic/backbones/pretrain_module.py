"""The training step of a backbone's pretraining.

Shapes: N sequences in a batch, C context.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.training.fit import FitConfig, optimizer_of

__all__ = ["Pretraining"]


class Pretraining(pl.LightningModule):
    """Next-token cross-entropy on a Hugging Face causal language model; all its parameters are trained."""

    def __init__(self, model: PreTrainedModel, config: FitConfig) -> None:
        super().__init__()
        self.model, self.config = model.train(), config

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Mean next-token cross-entropy in nats of a batch with `input_ids` (N, C)."""
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss

    def configure_optimizers(self) -> Any:
        return optimizer_of(list(self.model.parameters()), self.config)
