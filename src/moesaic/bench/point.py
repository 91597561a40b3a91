"""One point of a record, timed in whatever process calls it: models are loaded from disk, set up, timed.

Shapes: N prompt rows, C tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from moesaic.backbones.source import ModelSource
from moesaic.bench.config import BenchConfig
from moesaic.bench.timing import time_models
from moesaic.ffn.families import FFNPattern
from moesaic.methods.base import select_blocks
from moesaic.sparse.model import load_model
from moesaic.sparse.select import Selection

__all__ = ["BenchRequest", "bench_point"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BenchRequest:
    """Folders of the dense and of the sparse model (the same one is allowed), and what to time them on.

    `select` is given to every sparse layer, or one to each (None: as saved). `prompts` is int64 (N, C), real tokens;
    `samples` is the parquet file for the raw samples. `pattern` says where an unknown family has its FFNs.
    """

    dense: Path
    sparse: Path
    select: Selection | Sequence[Selection] | None
    prompts: np.ndarray
    config: BenchConfig
    samples: Path
    pattern: FFNPattern | None = None


def bench_point(request: BenchRequest) -> dict[str, Any]:
    """`speed` rows and `ceilings` of the request, after writing the raw samples.

    Meant for a process of its own: it sets the number of threads and silences loading bars.

    Raises: what `time_models` raises, ValueError or OSError for folders that hold no model.
    """
    config = request.config
    transformers.logging.disable_progress_bar()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dense, own = (_load(folder, config) for folder in (request.dense, request.sparse))
    if request.select is not None:
        select_blocks(own, request.select)
    prompts_NC = torch.from_numpy(request.prompts).to(dense.device)
    timing = time_models(dense, own, prompts_NC, config, pattern=request.pattern)
    pd.DataFrame(timing.samples).to_parquet(request.samples)
    result = timing.plain()
    for row in result["speed"]:
        row["samples_file"] = request.samples.name
    return result


def _load(folder: Path, config: BenchConfig) -> PreTrainedModel:
    sparse = (folder / "modeling_moesaic.py").exists()
    model = load_model(folder) if sparse else ModelSource.read(folder).model()
    dtype = model.dtype if config.dtype is None else getattr(torch, config.dtype)
    moved: PreTrainedModel = nn.Module.to(model, device=config.device, dtype=dtype)
    return moved
