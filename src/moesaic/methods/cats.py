"""CATS: thresholds on the gate activations, found on calibration inputs; nothing is trained.

Source: arXiv:2404.08763; variants in conf/method/cats.yaml. Shapes: T tokens, D model dim, B blocks, N scores.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from moesaic.methods.base import AdaptJob, Phase, layer_generator
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.magnitude import QuantileTable, binned_quantiles, exact_quantiles

__all__ = ["FitQuantiles", "sample_scores"]

_CHUNK_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class FitQuantiles(Phase):
    """Find each layer's quantiles of the scores that its calibration inputs get; any `p` is looked up in them later.

    `estimate`: exact, of up to `max_scores` scores per layer drawn at random, or the released histogram.
    """

    estimate: Literal["exact", "histogram"]
    max_scores: int = 1_000_000

    trains_weights: ClassVar[bool] = False
    uses_selection: ClassVar[bool] = False

    def run(self, job: AdaptJob) -> dict[str, Any]:
        assert job.calibration is not None
        quantiles = exact_quantiles if self.estimate == "exact" else binned_quantiles
        started, medians = time.perf_counter(), []
        for index, layer in enumerate(sparse_layers(job.model)):
            if not isinstance(layer.select_state, QuantileTable):
                raise ValueError(
                    f"FitQuantiles finds thresholds for select=Quantile, but select={layer.select}. Select "
                    "moesaic.sparse.magnitude.Quantile, or leave the phase out (null)."
                )
            x_TD = job.calibration.inputs_TD(index)
            score_N = sample_scores(layer, x_TD, self.max_scores, layer_generator(job.seed, index))
            layer.select_state.quantile_Q.copy_(quantiles(score_N))
            medians.append(layer.select_state.threshold(0.5).item())
        seconds = time.perf_counter() - started
        return {"tokens": 0, "steps": 0, "wall_seconds": seconds, "median_score_L": medians}


@torch.no_grad()
def sample_scores(layer: SparseFFN, x_TD: Tensor, max_scores: int, generator: Generator) -> Tensor:
    """float32 (N,): the scores of all tokens and blocks, or `max_scores` of them, as many from each chunk of tokens."""
    assert layer.score is not None
    share = min(1.0, max_scores / (len(x_TD) * layer.experts.num_blocks))
    kept = []
    for chunk_TD in x_TD.split(_CHUNK_TOKENS):
        score_TB = layer.score.activate(layer.score(chunk_TD.to(layer.experts.up_BSD), layer.experts))
        score_N = score_TB.flatten().cpu()
        if share < 1:
            # With replacement: a permutation of all scores takes longer than the scores.
            score_N = score_N[torch.randint(len(score_N), (round(share * len(score_N)),), generator=generator)]
        kept.append(score_N)
    return torch.cat(kept)
