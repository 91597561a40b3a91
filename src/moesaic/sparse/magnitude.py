"""Sparsity by magnitude: a neuron runs when its gate activation is larger than a threshold that calibration found.

Source: arXiv:2404.08763 (CATS). Shapes: T tokens, D model dim, F neurons, B blocks, N calibration scores, Q quantiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from moesaic.sparse.experts import Experts
from moesaic.sparse.routing import Routing
from moesaic.sparse.score import Score, ScoreModule
from moesaic.sparse.select import RoutingContext, Selection

__all__ = ["GateMagnitude", "Quantile", "QuantileTable", "binned_quantiles", "exact_quantiles"]

STEPS = 1000  # quantiles are kept for every thousandth; between two of them a threshold is interpolated
_BINS, _LARGEST = 10_000, 2.0  # the positive half of the released histogram


@dataclass(frozen=True, kw_only=True, slots=True)
class GateMagnitude(Score):
    """The block's largest |act(gate x)|, |act(up x)| in a plain FFN: a product that the FFN computes anyway.

    Source: arXiv:2404.08763. Differs: blocks of more than one neuron, and plain FFNs, have a score too.
    """

    def build(self, dim: int, num_blocks: int) -> ScoreModule:
        return _GateMagnitudeModule(self)


class _GateMagnitudeModule(ScoreModule):
    is_first_product: ClassVar[bool] = True

    def forward(self, x_TD: Tensor, experts: Experts) -> Tensor:
        rows = experts.rows()
        if rows.gate_RD is None:
            first_RD, bias_R = rows.up_RD, rows.up_bias_R
        else:
            first_RD, bias_R = rows.gate_RD, rows.gate_bias_R
        # In the FFN's own dtype: the comparison is about the very values that it multiplies with.
        gate_TF = experts.act(nnf.linear(x_TD.to(first_RD.dtype), first_RD, bias_R))
        return gate_TF.float().abs().unflatten(1, (experts.num_blocks, experts.block_size)).amax(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantile(Selection):
    """A block runs when its score is above the `p`-quantile of the layer's calibration scores; equal is not enough.

    So about a share `p` (0..1) of all (token, block) pairs stays off; p 0 switches the rule off, which is the dense
    FFN. Where a call brings more than one token of a sequence, the first `prefill_dense_share` (0..1, rounded up) of
    them run every block: masking hurts most there. The quantiles are the layer's state; `methods.cats.FitQuantiles`
    finds them. Raises ValueError for shares out of range, and when called before they were found.
    Source: arXiv:2404.08763. Differs: dense first tokens, from a comment in the released code of arXiv:2408.14690.
    """

    p: float
    prefill_dense_share: float

    knob: ClassVar[str] = "p"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("p", "prefill_dense_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"select.{name}={getattr(self, name)} is outside 0..1")

    def __call__(self, score_TX: Tensor, context: RoutingContext | None = None) -> Routing:
        num_tokens, num_blocks = score_TX.shape
        if self.p == 0:
            return Routing.from_prefix(num_blocks, num_tokens=num_tokens, num_blocks=num_blocks, device=score_TX.device)
        if context is None or not isinstance(context.state, QuantileTable):
            raise ValueError("Quantile compares with a layer's calibration scores: call it through the layer.")
        active_TB = score_TX > context.state.threshold(self.p)
        return Routing.from_mask(active_TB | self._dense_T1(num_tokens, context.num_sequences, score_TX.device))

    def state(self, num_blocks: int) -> nn.Module:
        return QuantileTable()

    def static_blocks(self, num_blocks: int) -> int | None:
        return num_blocks if self.p == 0 else None

    def share(self, num_blocks: int) -> float:
        return 1 - self.p

    def with_share(self, share: float, num_blocks: int) -> Quantile:
        return replace(self, p=1 - share)

    def _dense_T1(self, num_tokens: int, num_sequences: int, device: torch.device) -> Tensor:
        """Boolean (T, 1): the tokens at the start of a prefill."""
        length = num_tokens // num_sequences
        dense = math.ceil(self.prefill_dense_share * length) if length > 1 else 0
        return (torch.arange(num_tokens, device=device) % max(1, length) < dense)[:, None]


class QuantileTable(nn.Module):
    """A layer's quantiles at 0, 0.001, ..., 1: float32 buffer `quantile_Q`, NaN until they are found."""

    quantile_Q: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("quantile_Q", torch.full((STEPS + 1,), torch.nan))

    def threshold(self, p: float) -> Tensor:
        """The p-quantile, 0-dim; linear between two entries. Raises ValueError while there are none."""
        position = round(p * STEPS, 6)
        low = math.floor(position)
        pair = self.quantile_Q[low : low + 2]
        if bool(pair.isnan().any()):
            raise ValueError(
                "the quantiles of this layer were never found: the recipe needs the phase moesaic.methods.cats."
                "FitQuantiles before the model runs at p above 0."
            )
        return torch.lerp(pair[0], pair[-1], position - low)


def exact_quantiles(score_N: Tensor) -> Tensor:
    """float32 (Q,): at p the smallest score that at least a share p of all scores does not exceed."""
    sorted_N = score_N.float().sort().values
    wanted_Q = torch.arange(STEPS + 1, device=score_N.device) * len(sorted_N)
    return sorted_N[((wanted_Q + STEPS - 1) // STEPS - 1).clamp(min=0)]


def binned_quantiles(score_N: Tensor) -> Tensor:
    """float32 (Q,): the upper edge of the first of 10,000 bins on 0..2 up to which a share p lies; never above 2.

    Source: github.com/ScalingIntelligence/CATS. Differs: scores beyond 2 count as themselves, not as pre-activations.
    """
    counts = torch.histc(score_N.float().clamp(max=_LARGEST), bins=_BINS, min=0.0, max=_LARGEST)
    share = counts.double().cumsum(0) / len(score_N)
    p_Q = torch.arange(STEPS + 1, dtype=torch.float64, device=score_N.device) / STEPS
    bin_Q = torch.searchsorted(share, p_Q - 1e-9).clamp(max=_BINS - 1)
    return ((bin_Q + 1) * (_LARGEST / _BINS)).float()
