"""Calibration: the inputs that each FFN of the dense model really sees, kept on disk.

Shapes: T tokens, D model dim.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.data.objective import forward, objective_of
from moesaic.data.tokens import TokenSplit
from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import FFNSite, capture_inputs, capture_outputs, find_ffns
from moesaic.training.loader import Batch, take_rows

__all__ = ["Calibration", "calibrate", "output_gradients"]

_WINDOWS, _WINDOW_OF_ROW = "windows.safetensors", "window_T"


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Cached FFN inputs of `num_tokens` training tokens; statistics come from the dense model, before the cut."""

    folder: Path
    num_layers: int
    num_windows: int
    num_tokens: int

    @classmethod
    def load(cls, folder: Path) -> Calibration:
        """The calibration that `calibrate` wrote to `folder`."""
        meta = json.loads((folder / "calibration.json").read_text())
        return cls(
            folder=folder, num_layers=meta["num_layers"], num_windows=meta["num_windows"], num_tokens=meta["num_tokens"]
        )

    def inputs_TD(self, layer: int) -> Tensor:
        """(T, D) inputs of FFN `layer` in the model's dtype, read lazily from disk."""
        return self._read(f"layer_{layer:03d}.safetensors", "inputs_TD")

    def windows_NC(self) -> Tensor:
        """(N, C) int64 token ids that the model was given, windows in the order of the rows of `inputs_TD`."""
        return self._read(_WINDOWS, "input_ids")

    def windows(self, first: int, last: int) -> Batch:
        """The calibration windows `first` .. `last` - 1 as a batch of what the model was given."""
        with safe_open(self.folder / _WINDOWS, framework="pt") as file:
            names = [name for name in file.keys() if name != _WINDOW_OF_ROW]  # noqa: SIM118  (it is no mapping)
            return {name: file.get_tensor(name)[first:last] for name in names}

    def window_T(self) -> Tensor:
        """(T,) int64: the window each row came from, so that a split never parts the tokens of one window."""
        return self._read(_WINDOWS, _WINDOW_OF_ROW)

    def _read(self, name: str, key: str) -> Tensor:
        with safe_open(self.folder / name, framework="pt") as file:
            return file.get_tensor(key)


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel,
    tokens: TokenSplit,
    folder: Path,
    *,
    pattern: FFNPattern | None,
    num_tokens: int,
    context: int,
    batch_size: int = 8,
) -> Calibration:
    """Run the dense model over about `num_tokens` evenly spread training tokens and keep what each FFN was given.

    The model is given what its objective gives it in training (masked, cut in halves, labelled); padding is not kept.
    Raises ValueError when the corpus has fewer tokens than asked for. Source: arXiv:2110.01786 (calibrate on the dense
    model); layer by layer in memory, one file per layer, so a conversion reads one layer at a time.
    """
    sites = find_ffns(model, pattern)
    objective = objective_of(model, tokens)
    columns = objective.columns(tokens, context)
    num_rows, tokens_per_row = len(columns["input_ids"]), objective.tokens_per_row(columns)
    num_windows = int(num_tokens / tokens_per_row)
    if not 0 < num_windows <= num_rows:
        raise ValueError(
            f"method.calibration_tokens={num_tokens} needs {num_windows} windows of {tokens_per_row:g} tokens, but the "
            f"training split has {num_rows}. Ask for {math.ceil(tokens_per_row)}..{int(num_rows * tokens_per_row)} "
            "tokens or add data."
        )
    chosen = torch.linspace(0, num_rows - 1, num_windows).long()
    rows = {name: take_rows(column, chosen).long() for name, column in columns.items()}
    batch = objective.batch(rows, [f"calibration/{row}" for row in chosen.tolist()])
    windows = {name: column.contiguous() for name, column in batch.items()}  # what was cut cannot be saved
    seen: list[list[Tensor]] = [[] for _ in sites]
    model.eval()
    for first in range(0, num_windows, batch_size):
        batch = {name: column[first : first + batch_size] for name, column in windows.items()}
        with capture_inputs(sites, partial(keep_rows, seen, batch.get("attention_mask"))):
            forward(model, batch)
    for index, parts in enumerate(seen):
        save_file({"inputs_TD": torch.cat(parts)}, folder / f"layer_{index:03d}.safetensors")
        parts.clear()
    window_NC = torch.arange(num_windows)[:, None].expand(-1, round(tokens_per_row))
    if "attention_mask" in windows:
        window_NC = torch.arange(num_windows)[:, None].expand_as(windows["attention_mask"])
    window_T = flat_rows(window_NC[..., None], windows.get("attention_mask"))[:, 0].contiguous()
    save_file({**windows, _WINDOW_OF_ROW: window_T}, folder / _WINDOWS)
    meta = {"num_layers": len(sites), "num_windows": num_windows, "num_tokens": len(window_T), "context": context}
    (folder / "calibration.json").write_text(json.dumps(meta))
    return Calibration.load(folder)


def output_gradients(
    model: PreTrainedModel, sites: Sequence[FFNSite], calibration: Calibration, *, batch_size: int = 8
) -> list[Tensor]:
    """For each FFN of the dense model, dL/dy (T, D) of its outputs y, in the order of the rows of `inputs_TD`.

    L is the loss of the model's objective, a mean over a window and a sum over windows.
    """
    seen: list[list[Tensor]] = [[] for _ in sites]
    model.eval()
    for first in range(0, calibration.num_windows, batch_size):
        batch = calibration.windows(first, first + batch_size)
        outputs: dict[int, Tensor] = {}
        with torch.enable_grad(), capture_outputs(sites, outputs.__setitem__):
            loss = forward(model, {"labels": batch["input_ids"], **batch}).loss * len(batch["input_ids"])
        gradients = torch.autograd.grad(loss, [outputs[site.index] for site in sites])
        for index, gradient in enumerate(gradients):
            keep_rows(seen, batch.get("attention_mask"), index, gradient)
    return [torch.cat(parts) for parts in seen]


def keep_rows(seen: list[list[Tensor]], kept_NC: Tensor | None, index: int, x: Tensor) -> None:
    """Add the rows `x` (N, C, D) of FFN `index` to what it has seen."""
    seen[index].append(flat_rows(x, kept_NC))


def flat_rows(x: Tensor, kept_NC: Tensor | None) -> Tensor:
    """(T, D) copy of `x` (N, C, D), of which only those tokens are kept that `kept_NC` marks (None: all)."""
    rows_TD = x.reshape(-1, x.shape[-1])
    return rows_TD.clone() if kept_NC is None else rows_TD[kept_NC.flatten().bool()]
