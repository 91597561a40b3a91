"""When checkpoints are taken: every so many steps, at the end, and before giving way to Ctrl-C or SIGTERM."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from moesaic.training.recorder import Recorder

__all__ = ["Checkpoints", "interrupt_between_steps"]


class Checkpoints(Callback):
    """Saves to `path` after an optimizer step, when gradients hold nothing that a restart would lose.

    Must come after `recorder` among the callbacks: weights that a bad loss has reached are never saved.
    """

    def __init__(self, path: Path, every_steps: int, recorder: Recorder) -> None:
        self.path = path
        self.interrupted = False
        self._every_steps = every_steps
        self._recorder = recorder
        self._step = self._saved = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self._every_steps == 0 or self.interrupted or trainer.received_sigterm:
            self._save(trainer)
        if self.interrupted:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved != self._step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._recorder.check_losses()
        trainer.save_checkpoint(self.path)
        self._saved = self._step


@contextmanager
def interrupt_between_steps(checkpoints: Checkpoints) -> Iterator[None]:
    """Let the first Ctrl-C wait for the end of the step and its checkpoint; a second one is immediate.

    Does nothing outside the main thread or where somebody else handles SIGINT.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before is not signal.default_int_handler:
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        if checkpoints.interrupted:
            raise KeyboardInterrupt
        checkpoints.interrupted = True
        print("\ninterrupted: saving a checkpoint after this step (Ctrl-C again: stop at once)", file=sys.stderr)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
