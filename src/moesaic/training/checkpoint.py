"""Checkpoint files: written whole or not at all, checked before use; with random states, without frozen weights."""

import logging
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer

from moesaic.training.errors import CheckpointError
from moesaic.training.files import replace_whole
from moesaic.training.randomness import random_state, set_random_state

__all__ = ["DurableCheckpointIO", "RandomState", "TrainedWeights", "whole_checkpoint"]

_log = logging.getLogger(__name__)


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames; Lightning's own moves an unsynced file from the temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replace `path` by `checkpoint`.

        Raises:
            CheckpointError: the disk is full or refuses; the previous checkpoint is still there.
        """
        try:
            with replace_whole(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            cause = _system_error(error)
            if cause is None:
                raise
            message = (
                f"cannot write the checkpoint ({cause.strerror}). Free space or choose another folder, then run again: "
                "training continues from the checkpoint before this one, if there is one"
            )
            raise CheckpointError(cause.errno, message, str(path)) from error


class TrainedWeights(Callback):
    """Keeps frozen parameters out of the checkpoint: they come from the dense model again, and may be most of it.

    What counts is which parameters are frozen when the fit starts.
    """

    def __init__(self, module: LightningModule) -> None:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self.frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
        self.trained = set(parameters) - self.frozen

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name not in self.frozen}
        # Never read back, and whatever type they have would make the file unreadable to a safe load.
        for name in ("hyper_parameters", "hparams_name", "hparams_type"):
            checkpoint.pop(name, None)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        missing = sorted(self.trained - set(checkpoint["state_dict"]))
        unknown = sorted(set(checkpoint["state_dict"]) - set(pl_module.state_dict()))
        if missing or unknown:
            raise ValueError(
                f"{trainer.ckpt_path} belongs to another model: it lacks {missing[:3]} and has unknown {unknown[:3]}. "
                "Delete it to train from the start."
            )


class RandomState(Callback):
    """Saves and restores the state of every random generator a training step may draw from; Lightning saves none."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return random_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None:
            set_random_state(self._loaded)
            self._loaded = None


def whole_checkpoint(path: Path) -> Path | None:
    """`path` if it holds a readable checkpoint, else None; a damaged file is renamed to `*.damaged` with a warning."""
    if not path.exists():
        return None
    reason = _damage(path)
    if reason is None:
        return path
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    _log.warning("checkpoint %s is damaged (%s): moved to %s, training starts over", path, reason, aside.name)
    return None


def _damage(path: Path) -> str | None:
    try:
        # torch reads the archive without comparing checksums; the standard library does compare.
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                return f"checksum of {bad}"
        keys = set(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (OSError, EOFError, RuntimeError, UnpicklingError, zipfile.BadZipFile, ValueError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    needed = {"state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers"}
    return f"no {sorted(needed - keys)} in it" if needed - keys else None


def _system_error(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`: torch wraps a failed write into a RuntimeError about file positions."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
