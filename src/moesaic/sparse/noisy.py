"""LLaMA-MoE's router: a clean score plus trained noise, which exists in training only.

Source: arXiv:1701.06538 sec. 2.1 eq. 3-5 (noisy top-k); arXiv:2406.16554 and its released code (tanh router).
Shapes: T tokens, D model dim, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor, nn

from moesaic.sparse.experts import Experts
from moesaic.sparse.precision import full_precision
from moesaic.sparse.score import Linear, Score, ScoreModule, TanhMLP

__all__ = ["Noisy", "NoisyModule"]

_LEAST_STD = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Noisy(Score):
    """A router whose logits get noise of standard deviation softplus(x Wn) + 0.01 in training; Wn starts at zero.

    `router`: tanh_mlp, W2 tanh(W1 x) from a random start; linear, one layer that starts at zero. Neither has biases.
    """

    router: Literal["tanh_mlp", "linear"] = "tanh_mlp"
    noise: bool = True

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return NoisyModule(self, dim, num_blocks)


class NoisyModule(ScoreModule):
    """The score of one layer. `noise_DB` is None where the noise is switched off."""

    config: Noisy

    def __init__(self, config: Noisy, dim: int, num_blocks: int) -> None:
        super().__init__(config)
        tanh, linear = TanhMLP(init="random", normalise_input=False), Linear(bias=False)
        self.router = (tanh if config.router == "tanh_mlp" else linear).build(dim, num_blocks)
        self.noise_DB = nn.Parameter(torch.zeros(dim, num_blocks)) if config.noise else None

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        clean_TB = self.router(x_TD, experts)
        if self.noise_DB is None or not self.training:
            return clean_TB
        # Drawn like dropout, from the global generator that a fit seeds and its checkpoints keep.
        return clean_TB + torch.randn_like(clean_TB) * self.noise_std(x_TD)

    def noise_std(self, x_TD: Tensor) -> Tensor:
        """float32 (T, B): the standard deviation of the training noise, ln 2 + 0.01 at the start."""
        assert self.noise_DB is not None
        with full_precision(x_TD.device):
            return nnf.softplus(x_TD.float() @ self.noise_DB.float()) + _LEAST_STD

    def initialise(self, experts: Experts, x_TD: Tensor | None, *, generator: Generator) -> None:
        if self.config.router == "tanh_mlp":
            self.router.initialise(experts, x_TD, generator=generator)
