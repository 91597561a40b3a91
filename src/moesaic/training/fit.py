"""One training run: what it is (`FitConfig`) and doing it exactly resumably (`fit`).

Importing this module loads neither torch nor Lightning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesaic.training.errors import CheckpointError, DivergedError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule
    from torch import Tensor

    from moesaic.training.loader import Batches

__all__ = [
    "CheckpointError",
    "DivergedError",
    "FitConfig",
    "FitResult",
    "fit",
    "learning_rate_frac",
    "optimizer_of",
    "part_of",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """Optimizer, schedule and length of one fit. One step = `accumulate` batches of `batch_size` rows.

    `batch_size` counts the rows of all processes together, so that the result does not depend on their number.
    """

    steps: int  # optimizer steps
    batch_size: int  # rows (sequences, or tokens where rows are hidden states)
    lr: float  # peak learning rate
    optimizer: Literal["adamw", "adam"] = "adamw"  # adam: weight decay is L2, added to the gradient
    warmup_steps: int = 0  # linear, from lr / warmup_steps
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after warm-up
    final_lr_frac: float = 0.0  # of lr, reached at `steps` and held
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0  # global gradient norm, clipped after backward; None: no clipping
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"  # bf16-true: bfloat16 weights, too
    strategy: str = "auto"  # auto: one device; otherwise a Lightning strategy name (ddp, fsdp, ...) on all devices
    accumulate: int = 1  # batches whose gradients are averaged into one step
    # These two decide only when files are written, never a weight.
    checkpoint_every_steps: int = field(default=200, metadata={"identity": False})
    log_every_steps: int = field(default=10, metadata={"identity": False})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be positive and finite")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be within 0..steps={self.steps}")
        if not 0 <= self.final_lr_frac <= 1:
            raise ValueError(f"final_lr_frac={self.final_lr_frac} must be within 0..1 (a share of lr)")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive; null switches clipping off")
        if self.schedule == "constant" and self.final_lr_frac:
            warnings.warn("final_lr_frac has no effect with schedule=constant", stacklevel=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """What a finished fit has to tell. `seconds` sums training time over all restarts, lost work excluded."""

    seconds: float
    steps: int
    tokens: int  # trained on, all processes together
    final_loss: float  # mean over the last 50 batches
    history: Path  # metrics.jsonl: step, loss, lr, tokens_per_second and what training_step returned beside the loss


def fit(module: LightningModule, batches: Batches, cfg: FitConfig, *, folder: Path, label: str) -> FitResult:
    """Train `module` in place for `cfg.steps`; continue bit for bit from `folder/last.ckpt` if it is there.

    The result is a function of `module`, `batches` and `cfg` alone: global random generators are seeded by
    `batches.seed` for the time of the fit and restored. `batches` is read from its beginning, as many batches as the
    steps need. Submodules stay in the train or eval mode that they are in. Parameters that are frozen when the fit
    starts are not in the checkpoint. `training_step` returns the loss, or a dict of `loss` and scalars to record; state
    that it changes must not change in `on_train_batch_end`, which a checkpoint precedes.
    The checkpoint of the last step stays in the folder: whoever called deletes it once the result is safe.

    Raises:
        DivergedError: the loss is not finite.
        CheckpointError: a checkpoint could not be written.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint of the last whole step.
        SystemExit: code 143 after SIGTERM, with a checkpoint too unless it arrived between accumulated batches.
    """
    from moesaic.training.lightning import run

    return run(module, batches, cfg, folder=folder, label=label)


def part_of(cfg: FitConfig, span_frac: tuple[float, float]) -> tuple[FitConfig, int]:
    """The fit that covers `cfg` from one share of its steps (0..1) to another, and the step (from 0) where it begins.

    Parts that meet have the steps of the whole together. Each has a schedule of its own, with its part of the warm-up.
    Raises ValueError for a part without a step.
    """
    begin, end = (round(frac * cfg.steps) for frac in span_frac)
    if not 0 <= begin < end <= cfg.steps:
        raise ValueError(
            f"span_frac={list(span_frac)} holds no step of fit.steps={cfg.steps}. Give two rising shares within 0..1, "
            "or more steps."
        )
    steps = end - begin
    return replace(cfg, steps=steps, warmup_steps=round(cfg.warmup_steps * steps / cfg.steps)), begin


def optimizer_of(parameters: Iterable[Tensor | dict[str, Any]], cfg: FitConfig) -> Any:
    """What `LightningModule.configure_optimizers` returns: the optimizer and its per-step schedule.

    `parameters` are tensors, of which matrices decay and vectors (biases, norms) do not, and optimizer groups: dicts of
    `params` and any of `lr`, `weight_decay`, `betas`, taken as they are. What is frozen is left out.

    Raises:
        ValueError: nothing is left to train.
    """
    import torch

    groups = [group for group in map(_trainable, _groups(list(parameters), cfg)) if group["params"]]
    if not groups:
        raise ValueError("nothing to train: no parameter requires a gradient")
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[cfg.optimizer]
    optimizer = kind(groups, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_frac(step, cfg))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _groups(parameters: list[Any], cfg: FitConfig) -> list[dict[str, Any]]:
    tensors = [p for p in parameters if not isinstance(p, dict)]
    return [
        {"params": [p for p in tensors if p.ndim > 1]},
        {"params": [p for p in tensors if p.ndim <= 1], "weight_decay": 0.0},
        *(p for p in parameters if isinstance(p, dict)),
    ]


def _trainable(group: dict[str, Any]) -> dict[str, Any]:
    return {**group, "params": [p for p in group["params"] if p.requires_grad]}


def learning_rate_frac(step: int, cfg: FitConfig) -> float:
    """Share of `cfg.lr` used by optimizer step `step` (from 0), 0..1; the floor is held from `cfg.steps` on."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return 1.0
    done = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps))
    remaining = 1.0 - done if cfg.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return cfg.final_lr_frac + (1.0 - cfg.final_lr_frac) * remaining
