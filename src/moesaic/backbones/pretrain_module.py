"""The training step of a backbone that is trained here."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.data.objective import task_loss
from moesaic.training.fit import FitConfig, optimizer_of

__all__ = ["Pretraining"]


class Pretraining(pl.LightningModule):
    """The cross-entropy of a Hugging Face model's objective; all its parameters are trained."""

    def __init__(self, model: PreTrainedModel, config: FitConfig) -> None:
        super().__init__()
        self.model, self.config = model.train(), config

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Mean loss in nats of a batch of the objective."""
        return task_loss(self.model, batch)

    def configure_optimizers(self) -> Any:
        return optimizer_of(list(self.model.parameters()), self.config)
