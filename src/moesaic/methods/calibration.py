"""Calibration: the inputs that each FFN of the dense model really sees, kept on disk.

Shapes: T tokens, D model dim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.data.tokens import TokenSplit
from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import capture_inputs, find_ffns

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Cached FFN inputs of `num_tokens` training tokens; statistics come from the dense model, before the cut."""

    folder: Path
    num_layers: int
    num_tokens: int

    @classmethod
    def load(cls, folder: Path) -> Calibration:
        """The calibration that `calibrate` wrote to `folder`."""
        meta = json.loads((folder / "calibration.json").read_text())
        return cls(folder=folder, num_layers=meta["num_layers"], num_tokens=meta["num_tokens"])

    def inputs_TD(self, layer: int) -> Tensor:
        """(T, D) inputs of FFN `layer` in the model's dtype, read lazily from disk."""
        return self._read(f"layer_{layer:03d}.safetensors", "inputs_TD")

    def windows_NC(self) -> Tensor:
        """(N, C) int64 token ids of the calibration windows, in the order of the rows of `inputs_TD`."""
        return self._read("windows.safetensors", "ids_NC")

    def window_T(self) -> Tensor:
        """(T,) int64: the window each row came from, so that a split never parts the tokens of one window."""
        windows_NC = self.windows_NC()
        return torch.arange(len(windows_NC)).repeat_interleave(windows_NC.shape[1])

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
    """Run the dense model over `num_tokens` evenly spread training tokens and keep what each FFN was given.

    Raises ValueError when the corpus has fewer tokens than asked for. Source: arXiv:2110.01786 (calibrate on the dense
    model); layer by layer in memory, one file per layer, so a conversion reads one layer at a time.
    """
    sites = find_ffns(model, pattern)
    windows_NC = tokens.blocks(context)
    num_windows = num_tokens // context
    if not 0 < num_windows <= len(windows_NC):
        raise ValueError(
            f"method.calibration_tokens={num_tokens} needs {num_windows} windows of {context} tokens, but the training "
            f"split has {len(windows_NC)}. Ask for {context}..{len(windows_NC) * context} tokens or add data."
        )
    chosen = torch.linspace(0, len(windows_NC) - 1, num_windows).long().tolist()
    seen: list[list[Tensor]] = [[] for _ in sites]
    ids_NC = torch.stack([torch.as_tensor(windows_NC[i].astype("int64")) for i in chosen])
    model.eval()
    with capture_inputs(sites, lambda index, x: seen[index].append(x.reshape(-1, x.shape[-1]).clone())):
        for batch_NC in ids_NC.split(batch_size):
            model(input_ids=batch_NC)
    for index, parts in enumerate(seen):
        save_file({"inputs_TD": torch.cat(parts)}, folder / f"layer_{index:03d}.safetensors")
        parts.clear()
    save_file({"ids_NC": ids_NC}, folder / "windows.safetensors")
    meta = {"num_layers": len(sites), "num_tokens": num_windows * context, "context": context}
    (folder / "calibration.json").write_text(json.dumps(meta))
    return Calibration.load(folder)
