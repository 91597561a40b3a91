"""Combination: the weights with which active blocks are summed, and what stands in for blocks that did not run.

Source: arXiv:2408.11855 and its released code (constant weight B // k; straight-through `dense`);
arXiv:2110.01786 branch `fastmoe` (straight-through on selected blocks); EMNLP 2024 main.563 (mean output of blocks that
did not run). Shapes: T tokens, D model dim, B blocks, N assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.experts import Experts
from moesaic.sparse.routing import Routing
from moesaic.sparse.stats import block_means

__all__ = ["EXACT_ZEROS", "Combine", "CombineModule", "scale_by_count"]

EXACT_ZEROS = ("relu", "relu2")  # activations after which a block that matters little gives exactly nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Combine:
    """How the outputs of active blocks are put together: weight x scale, plus the fill.

    `weight`: one, the token's score for the block, or that score over the sum of the token's active scores.
    `scale`, by the number n of a token's active blocks: one; count n (with equal renormalised weights the plain sum);
    total B; ratio B/n; floor_ratio B//n; sqrt_ratio sqrt(B/n); fitted, a constant per n found on calibration tokens;
    learned, one trained number per layer.
    `straight_through`: weight one gets the gradient of the score, for selected blocks, or for all of them (dense; needs
    the masked executor in training).
    `fill`: blocks that did not run give nothing (zero), or their mean output on calibration inputs (mean); auto is zero
    after ReLU and mean otherwise. With zero a token without any block gets no output bias either; bias is zero but for
    that. Raises ValueError for straight_through with another weight than one.
    """

    weight: Literal["one", "score", "renormalised"] = "one"
    scale: Literal["one", "count", "total", "ratio", "floor_ratio", "sqrt_ratio", "fitted", "learned"] = "one"
    straight_through: Literal["none", "selected", "dense"] = "none"
    fill: Literal["zero", "bias", "mean", "auto"] = "zero"

    def __post_init__(self) -> None:
        if self.straight_through != "none" and self.weight != "one":
            raise ValueError(
                f"combine.straight_through={self.straight_through} gives weight one a gradient, but combine.weight="
                f"{self.weight} has its own. Use weight: one, or straight_through: none."
            )

    def for_ffn(self, ffn: DenseFFN) -> Combine:
        """The same combination with `fill` auto decided for `ffn`, as `build` needs it."""
        if self.fill != "auto":
            return self
        return replace(self, fill="zero" if ffn.activation in EXACT_ZEROS else "mean")

    def build(self, dim: int, num_blocks: int) -> CombineModule:
        """The module for one layer: scales 1, means 0 until `initialise` or a checkpoint sets them."""
        if self.fill == "auto":
            raise ValueError("combine.fill=auto depends on the FFN: call for_ffn(ffn) before build.")
        return CombineModule(self, dim, num_blocks)


class CombineModule(nn.Module):
    """The combination of one layer; `config` is the component that built it.

    Buffer `scale_X` (X = B + 1) holds the fitted scale for n = 0..B active blocks, parameter `scale` the learned one,
    buffer `mean_BD` each block's mean output; each is there only where the config uses it.
    """

    scale_X: Tensor | None
    mean_BD: Tensor | None

    def __init__(self, config: Combine, dim: int, num_blocks: int) -> None:
        super().__init__()
        self.config = config
        self.scale = nn.Parameter(torch.ones(())) if config.scale == "learned" else None
        self.register_buffer("scale_X", torch.ones(num_blocks + 1) if config.scale == "fitted" else None)
        self.register_buffer("mean_BD", torch.zeros(num_blocks, dim) if config.fill == "mean" else None)

    @property
    def uses_score(self) -> bool:
        """Whether weights or their gradients depend on the scores."""
        return self.config.weight != "one" or self.config.straight_through != "none"

    @property
    def plain(self) -> bool:
        """Whether every weight is the constant 1 and nothing stands in for blocks that did not run."""
        return not self.uses_score and self.config.scale == "one" and self.config.fill == "zero"

    def forward(self, routing: Routing, score_TB: Tensor) -> Routing:
        """`routing` with the weights that the config asks for, float32.

        With dense straight-through in training all T * B assignments come back, 0 where a block is not selected, so
        that each gets a gradient; `counts_B` still counts the selected ones.
        """
        if self.config.scale == "one":
            if not self.uses_score:
                return routing
            if self.config.weight == "score" and routing.token_N.numel() == score_TB.numel():
                return Routing.of_all(score_TB)
        scale_T = self._scale_T(routing)
        weight_N = self._unscaled(routing, score_TB)
        if scale_T is not None:
            weight_N = weight_N * scale_T[routing.token_N]
        routing = routing.with_weight(weight_N)
        if self.config.straight_through == "dense" and self.training:
            surrogate_TB = _surrogate(score_TB if scale_T is None else score_TB * scale_T[:, None])
            everything_TB = torch.ones_like(score_TB, dtype=torch.bool)
            everything = Routing.from_mask(everything_TB, routing.weight_TB() + surrogate_TB)
            return replace(everything, counts_B=routing.counts_B)
        return routing

    def fill(self, routing: Routing) -> Tensor | None:
        """(T, D) sum of the mean outputs of the blocks that have weight 0 or none; None where the fill is zero."""
        if self.mean_BD is None:
            return None
        return (routing.weight_TB() == 0).to(self.mean_BD.dtype) @ self.mean_BD

    @torch.no_grad()
    def initialise(self, experts: Experts, x_TD: Tensor) -> None:
        """Set the mean outputs from calibration inputs, where the fill uses them."""
        if self.mean_BD is not None:
            self.mean_BD.copy_(block_means(experts, x_TD))

    def _unscaled(self, routing: Routing, score_TB: Tensor) -> Tensor:
        if self.config.weight == "one" and self.config.straight_through != "selected":
            return routing.weight_N
        score_N = score_TB.float()[routing.token_N, routing.block_N]
        if self.config.weight == "one":
            return routing.weight_N + _surrogate(score_N)
        if self.config.weight == "score":
            return score_N
        total_T = score_N.new_zeros(routing.num_tokens).index_add(0, routing.token_N, score_N)
        return score_N / total_T[routing.token_N]

    def _scale_T(self, routing: Routing) -> Tensor | None:
        """The scale of each token; None means 1 for all."""
        if self.config.scale == "one":
            return None
        if self.scale is not None:
            return self.scale.float().expand(routing.num_tokens)
        if self.scale_X is not None:
            return self.scale_X.float()[routing.count_T()]
        return scale_by_count(routing.count_T(), routing.num_blocks, self.config.scale)


def scale_by_count(count_T: Tensor, num_blocks: int, rule: str) -> Tensor:
    """float32 (T,), for tokens with n active blocks: n (rule count), B (total), B/n (ratio), B//n (floor_ratio) or
    sqrt(B/n) (sqrt_ratio). Ratios of tokens without a block are 1.
    """
    if rule == "count":
        return count_T.float()
    if rule == "total":
        return torch.full_like(count_T, num_blocks, dtype=torch.float32)
    count_T = torch.where(count_T > 0, count_T, num_blocks)
    if rule == "floor_ratio":
        return (num_blocks // count_T).float()
    ratio_T = num_blocks / count_T.float()
    return ratio_T.sqrt() if rule == "sqrt_ratio" else ratio_T


def _surrogate(score: Tensor) -> Tensor:
    """Exactly 0, with the gradient of the score. Added as it is it rounds nothing; weight + score - score would."""
    return score.float() - score.float().detach()
