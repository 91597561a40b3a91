"""The history of a fit: metrics.jsonl, the progress line, and the check that the loss is still a number."""

import json
import math
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from moesaic.training.errors import DivergedError
from moesaic.training.files import replace_whole
from moesaic.training.fit import FitConfig
from moesaic.training.progress import ProgressLine

__all__ = ["Recorder", "keep_rows"]


class Recorder(Callback):
    """Appends to `history`, shows progress and stops at the first loss that is not finite.

    Losses are fetched from the device only when a row or a checkpoint is due, so that the device is not waited for at
    every step; the error still names the step it happened at.
    """

    def __init__(self, history: Path, cfg: FitConfig, *, label: str, tokens_per_batch: int) -> None:
        self.history = history
        self.recent: deque[float] = deque(maxlen=50)
        self._cfg, self._label, self._tokens_per_batch = cfg, label, tokens_per_batch
        self._spent_seconds = 0.0
        self._started: float | None = None
        self._step = 0
        self._window: list[float] = []
        self._pending: list[tuple[int, Tensor]] = []
        self._extras: dict[str, Any] = {}
        self._facts = ""
        self._lr = 0.0
        self._file: TextIO | None = None
        self._progress: ProgressLine | None = None

    @property
    def seconds(self) -> float:
        """Training time so far, restarts included, lost work excluded."""
        return self._spent_seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "recent": list(self.recent), "window": list(self._window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._spent_seconds = state_dict["seconds"]
        self.recent.extend(state_dict["recent"])
        self._window = list(state_dict["window"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = self._row_started = time.monotonic()
        self._row_batches = 0
        self._step = trainer.global_step
        if trainer.is_global_zero:
            keep_rows(self.history, up_to_step=self._step)
            self._file = self.history.open("a", encoding="utf-8")
            self._progress = ProgressLine(self._label, self._cfg.steps, unit="steps")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step
        self._row_batches += 1
        if isinstance(outputs, Mapping) and "loss" in outputs:
            self._pending.append((self._step + 1, outputs["loss"]))
            self._extras = {name: value for name, value in outputs.items() if name != "loss"}
        self._step = trainer.global_step
        if stepped and (self._step % self._cfg.log_every_steps == 0 or self._step == self._cfg.steps):
            self.check_losses()
            self._write_row(trainer)
        if self._progress is not None:
            self._progress.update(self._step, self._facts)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        self._spent_seconds, self._started = self.seconds, None
        if self._file is not None:
            self._file.close()
        if self._progress is not None:
            self._progress.close()

    def check_losses(self) -> None:
        """Fetch the losses since the last call.

        Raises:
            DivergedError: one of them is NaN or infinite; names its optimizer step.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        losses = torch.stack([loss.float() for _, loss in pending]).tolist()
        for (step, _), loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                raise DivergedError(self._label, step, loss, self.recent[-1] if self.recent else None)
            self.recent.append(loss)
            self._window.append(loss)

    def _write_row(self, trainer: Trainer) -> None:
        now = time.monotonic()
        speed = self._row_batches * self._tokens_per_batch / max(now - self._row_started, 1e-9)
        self._row_started, self._row_batches = now, 0
        loss = sum(self._window) / max(1, len(self._window))
        self._window = []
        self._facts = f"loss {loss:.4g}  {speed:,.0f} tokens/s"
        if self._file is None:
            return
        row = {"step": self._step, "loss": loss, "lr": self._lr, "tokens_per_second": round(speed, 1)}
        row |= {name: float(value) for name, value in self._extras.items() if _is_scalar(value)}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # Read here: by the end of the batch the schedule has moved on to the next step's rate.
        self._lr = optimizer.param_groups[0]["lr"]


def keep_rows(history: Path, *, up_to_step: int) -> None:
    """Drop the rows of steps that will be done again, and a last line that a kill left half written."""
    if not history.exists():
        return
    kept = []
    for line in history.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= up_to_step:
            kept.append(line + b"\n")
    with replace_whole(history) as file:
        file.writelines(kept)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
