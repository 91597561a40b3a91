"""A fit small enough to repeat, with everything a restart could get wrong: dropout, accumulation, clipping, a schedule.

Run as a program it trains in the folder given, slowly enough to be stopped from outside.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from moesaic.training.fit import FitConfig, FitResult, fit, optimizer_of
from moesaic.training.loader import TokenBatches

CONFIG = FitConfig(
    steps=24,
    batch_size=3,
    lr=0.02,
    warmup_steps=3,
    schedule="cosine",
    final_lr_frac=0.1,
    weight_decay=0.1,
    clip_norm=0.5,
    accumulate=2,
    checkpoint_every_steps=5,
    log_every_steps=2,
)


class ToyModel(LightningModule):
    """Predicts the next token; `bad_step` turns the loss of that step (from 1) into NaN."""

    def __init__(self, cfg: FitConfig = CONFIG, *, pause_seconds: float = 0.0, bad_step: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen = nn.Embedding(16, 8).requires_grad_(False)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 16))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.cfg, self.pause_seconds, self.bad_step = cfg, pause_seconds, bad_step
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        time.sleep(self.pause_seconds)
        ids = batch["input_ids"]
        self.seen.append(ids)
        logits = self.net(self.frozen(ids[:, :-1]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        if self.bad_step is not None and self.global_step + 1 >= self.bad_step:
            loss = loss * float("nan")
        return {"loss": loss, "logit_max": logits.detach().max()}

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_of(self.parameters(), self.cfg)


def toy_batches() -> TokenBatches:
    blocks_NC = torch.randint(0, 16, (20, 9), generator=torch.Generator().manual_seed(1))
    return TokenBatches(blocks_NC, batch_size=CONFIG.batch_size, seed=5)


def toy_fit(model: ToyModel, folder: Path) -> FitResult:
    return fit(model, toy_batches(), model.cfg, folder=folder, label="toy")


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        toy_fit(ToyModel(pause_seconds=0.05), Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
