"""How much each nested expert already does of what the whole FFN does for a token: labels of difficulty, and oracles.

With y_e the sum of the outputs of level e's blocks and y that of all blocks (the output bias left out):
proj <y_e, y> / |y|^2; cos; rel_mse 1 - |y_e - y|^2 / |y|^2 = 2 proj - |y_e|^2 / |y|^2; resid_cos cos(r + y_e, r + y)
with r the residual stream that the output is added to. All float32, without gradient.
Source: arXiv:2502.12325 (labels from agreement with the full MLP); the measures are our reading, see
conf/method/dynamoe.yaml. Shapes: T tokens, D model dim, B blocks, S neurons per block, F = B * S, E levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.sparse.experts import Experts
from moesaic.sparse.levels import Levels, first_above, level_blocks, solve_theta
from moesaic.sparse.precision import full_precision
from moesaic.sparse.score import Score, ScoreModule
from moesaic.sparse.stats import hidden_chunks

__all__ = [
    "LabelRule",
    "Similarity",
    "SimilarityOracle",
    "all_above_from",
    "label_levels",
    "level_similarity",
    "similarity_of_outputs",
    "theta_of_share",
]

Similarity = Literal["proj", "cos", "rel_mse", "resid_cos"]
LabelRule = Literal["first_above", "all_above_from"]

_SILENT = 1e-6  # |y| below which an FFN does nothing that a prefix could be compared with
_OUTPUT_ELEMENTS = 2**25  # elements of y_TED held at once


@torch.no_grad()
def level_similarity(
    experts: Experts,
    x_TD: Tensor,
    levels_E: Sequence[int],
    measure: Similarity,
    *,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """float32 (T, E): the similarity of each level's output to the whole FFN's.

    Where the FFN does nothing (|y| < 1e-6) it is -inf for all levels but the last. Only resid_cos reads `residual_TD`.
    """
    parts = [x_TD.new_zeros(0, len(levels_E), dtype=torch.float32)]
    down_FD = experts.down_BSD.detach().float().flatten(0, 1)
    bias_D = experts.down_bias_D.detach().float() if experts.down_bias_D is not None else 0.0
    first = 0
    with full_precision(x_TD.device):
        for h_TF in hidden_chunks(experts.dense_ffn(), x_TD):
            if measure == "proj":
                parts.append(_projections(h_TF, down_FD, levels_E))
                continue
            for few_TF in h_TF.split(max(1, _OUTPUT_ELEMENTS // (len(levels_E) * down_FD.shape[1]))):
                y_TED = _prefix_outputs(few_TF, down_FD, levels_E)
                residual_tD = None
                if residual_TD is not None:
                    residual_tD = residual_TD[first : first + len(few_TF)].detach().float() + bias_D
                parts.append(similarity_of_outputs(y_TED, measure, residual_TD=residual_tD))
                first += len(few_TF)
    return torch.cat(parts)


def similarity_of_outputs(y_TED: Tensor, measure: Similarity, *, residual_TD: Tensor | None = None) -> Tensor:
    """float32 (T, E) from the outputs of all levels, of which the last is the whole FFN's."""
    y_TED = y_TED.float()
    full_T1D = y_TED[:, -1:]
    if measure == "resid_cos":
        assert residual_TD is not None
        r_T1D = residual_TD.float()[:, None]
        score_TE = F.cosine_similarity(r_T1D + y_TED, r_T1D + full_T1D, dim=-1)
    elif measure == "cos":
        score_TE = F.cosine_similarity(y_TED, full_T1D, dim=-1)
    else:
        square_T1 = full_T1D.square().sum(-1).clamp(min=_SILENT**2)
        score_TE = (y_TED * full_T1D).sum(-1) / square_T1
        if measure == "rel_mse":
            score_TE = 2 * score_TE - y_TED.square().sum(-1) / square_T1
    return _with_silent(score_TE, full_T1D[:, 0].norm(dim=-1))


def label_levels(score_TE: Tensor, theta: float, rule: LabelRule) -> Tensor:
    """int64 (T,): the level a token needs at sensitivity `theta`; the last level always qualifies.

    first_above: the first level above theta. all_above_from: the first from which on every level is above it.
    """
    return first_above(score_TE, theta) if rule == "first_above" else all_above_from(score_TE, theta)


def all_above_from(score_TE: Tensor, theta: float) -> Tensor:
    """int64 (T,): the first level e with every score from e on above `theta`, the last level left aside."""
    above_TE = score_TE > theta
    above_TE[:, -1] = True
    return above_TE.flip(1).int().cumprod(dim=1).flip(1).argmax(dim=1)


def theta_of_share(score_TE: Tensor, rule: LabelRule, share_E: Tensor, share: float) -> float:
    """The theta whose labels run `share` of the FFN on average, as near as these tokens allow."""
    return solve_theta(score_TE, lambda theta: share_E[label_levels(score_TE, theta, rule)].mean().item(), share)


@dataclass(frozen=True, kw_only=True, slots=True)
class SimilarityOracle(Score):
    """The similarities themselves: with `FirstAbove` the levels of the labels, from all experts, so no speed-up.

    Raises ValueError for resid_cos: an FFN does not see the residual stream.
    """

    similarity: Similarity
    levels: Levels = "linear"

    def __post_init__(self) -> None:
        if self.similarity == "resid_cos":
            raise ValueError(
                "similarity=resid_cos needs the residual stream, which no FFN sees: only labels can use it. Give the "
                "oracle rel_mse, cos or proj."
            )

    def num_scores(self, num_blocks: int) -> int:
        return len(level_blocks(self.levels, num_blocks))

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _SimilarityModule(self)


class _SimilarityModule(ScoreModule):
    config: SimilarityOracle

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        levels_E = level_blocks(self.config.levels, experts.num_blocks)
        return level_similarity(experts, x_TD, levels_E, self.config.similarity)


def _projections(h_TF: Tensor, down_FD: Tensor, levels_E: Sequence[int]) -> Tensor:
    """proj without the outputs of the levels: <y_e, y> is the sum over level e's neurons of h times g = down y."""
    y_TD = h_TF @ down_FD
    part_TB = (h_TF * (y_TD @ down_FD.mT)).unflatten(1, (levels_E[-1], -1)).sum(-1)
    last_E = torch.tensor(levels_E, device=h_TF.device) - 1
    dot_TE = part_TB.cumsum(dim=1)[:, last_E]
    norm_T = y_TD.norm(dim=1)
    score_TE = dot_TE / norm_T.square().clamp(min=_SILENT**2)[:, None]
    return _with_silent(score_TE, norm_T)


def _prefix_outputs(h_TF: Tensor, down_FD: Tensor, levels_E: Sequence[int]) -> Tensor:
    """(T, E, D): each level adds the blocks that the one before it lacks, so all together cost one dense product."""
    size = h_TF.shape[1] // levels_E[-1]
    starts = [0, *levels_E[:-1]]
    added = [
        h_TF[:, start * size : stop * size] @ down_FD[start * size : stop * size]
        for start, stop in zip(starts, levels_E, strict=True)
    ]
    return torch.stack(added, dim=1).cumsum(dim=1)


def _with_silent(score_TE: Tensor, norm_T: Tensor) -> Tensor:
    narrow_TE = (norm_T < _SILENT)[:, None].expand_as(score_TE).clone()
    narrow_TE[:, -1] = False
    return score_TE.masked_fill(narrow_TE, -torch.inf)
