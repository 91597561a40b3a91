"""Controls: the same converted model with its routing replaced, to tell where quality is lost.

`oracle_router` knows which blocks are best, `random_router` knows nothing, `all_blocks` runs every block with weight 1.
Shapes: L sparse layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from moesaic.methods.base import SparseMethod, replace_score, select_blocks
from moesaic.methods.calibration import Calibration
from moesaic.methods.factorllm import fit_scales
from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.select import AllBlocks

__all__ = ["Arm", "apply_arm"]

Arm = Literal["adapted", "learned_router", "oracle_router", "random_router", "all_blocks", "dense", "prepared_dense"]


def apply_arm(
    model: PreTrainedModel,
    arm: Arm,
    method: SparseMethod,
    budget: float,
    calibration: Calibration | None,
    seed: int,
    *,
    share_L: Sequence[float] | None = None,
    active_frac_L: Sequence[float] | None = None,
) -> None:
    """Set `model` to `budget` and, for a control arm, replace its routing; fitted scales are fitted to that routing.

    `share_L` is each layer's part of the budget, where the method allocates it (see `methods.allocate`).
    `active_frac_L` is what the adapted model ran in each layer: a control of an adaptive selection runs as much.
    """
    if arm == "all_blocks":
        select_blocks(model, AllBlocks())
        for layer in sparse_layers(model):
            layer.combine = Combine().build(layer.experts.dim, layer.experts.num_blocks)
        return
    select_blocks(model, method.selections_at(budget, share_L))
    if arm == "oracle_router":
        replace_score(model, method.oracle, seed)
    elif arm == "random_router":
        replace_score(model, method.random, seed)
    if arm in ("oracle_router", "random_router") and calibration is not None:
        if active_frac_L is not None:
            match_selection(model, calibration, active_frac_L)
        fit_scales(model, calibration)


@torch.no_grad()
def match_selection(
    model: PreTrainedModel, calibration: Calibration, active_frac_L: Sequence[float], *, max_tokens: int = 4096
) -> None:
    """Give each layer the selection under which it runs its share of blocks on the calibration inputs."""
    for index, (layer, share) in enumerate(zip(sparse_layers(model), active_frac_L, strict=True)):
        x_TD = calibration.inputs_TD(index)[:max_tokens].to(layer.experts.up_BSD.dtype)
        assert layer.score is not None
        score_TX = layer.score.activate(layer.score(x_TD, layer.experts))
        layer.select = layer.select.matched(score_TX, share, layer.experts.num_blocks)
