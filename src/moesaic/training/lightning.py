"""The Lightning side of `fit`. Imported only when a fit starts: Lightning takes seconds to load."""

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import SIGTERMException

from moesaic.training.checkpoint import DurableCheckpointIO, RandomState, TrainedWeights, whole_checkpoint
from moesaic.training.fit import FitConfig, FitResult
from moesaic.training.loader import Batches
from moesaic.training.randomness import own_randomness
from moesaic.training.recorder import Recorder
from moesaic.training.saving import Checkpoints, interrupt_between_steps

__all__ = ["run"]


def run(module: LightningModule, batches: Batches, cfg: FitConfig, *, folder: Path, label: str) -> FitResult:
    """See `moesaic.training.fit.fit`."""
    folder.mkdir(parents=True, exist_ok=True)
    # One single Lightning epoch, whatever the number of passes over the data: epochs end in the middle of an
    # accumulation and have resume rules of their own.
    stream = batches.with_steps(cfg.steps * cfg.accumulate)
    recorder = Recorder(folder / "metrics.jsonl", cfg, label=label, tokens_per_batch=stream.tokens_per_batch)
    checkpoints = Checkpoints(folder / "last.ckpt", cfg.checkpoint_every_steps, recorder)
    strict_loading = module.strict_loading
    module.strict_loading = False  # TrainedWeights checks instead: frozen parameters are missing on purpose
    try:
        with _quiet(), own_randomness(batches.seed), interrupt_between_steps(checkpoints):
            trainer = Trainer(
                **_trainer_options(cfg, folder),
                callbacks=[TrainedWeights(module), RandomState(), recorder, checkpoints],
            )
            trainer.fit(module, stream, ckpt_path=whole_checkpoint(checkpoints.path))
    except SystemExit as stop:
        # Lightning ends with exit(1) after Ctrl-C, as if something had failed, with exit(0) after SIGTERM, as if done.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if isinstance(stop, SIGTERMException):
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        module.strict_loading = strict_loading
    return FitResult(
        seconds=recorder.seconds,
        steps=trainer.global_step,
        tokens=len(stream) * stream.tokens_per_batch,
        final_loss=sum(recorder.recent) / max(1, len(recorder.recent)),
        history=recorder.history,
    )


def _trainer_options(cfg: FitConfig, folder: Path) -> dict[str, Any]:
    single = cfg.strategy == "auto"
    plugins: list[Any] = [DurableCheckpointIO()]
    if SLURMEnvironment.detect():
        # Whoever launched the job owns the requeue signal.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return {
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "devices": 1 if single else "auto",
        "num_nodes": 1 if single else int(os.environ.get("SLURM_NNODES", "1")),
        "strategy": cfg.strategy,
        "precision": cfg.precision,
        "max_steps": cfg.steps,
        "max_epochs": -1,
        "accumulate_grad_batches": cfg.accumulate,
        "gradient_clip_val": cfg.clip_norm,
        "limit_val_batches": 0,
        "plugins": plugins,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says about hardware, workers and tips; its errors are raised, not logged."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning")]
    rank_zero = [logging.getLogger(f"{logger.name}.utilities.rank_zero") for logger in loggers]
    levels = [(logger, logger.level) for logger in (*loggers, *rank_zero)]
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
