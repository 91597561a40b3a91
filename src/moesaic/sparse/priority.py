"""Expert preferred routing: levels with fixed capacities, filled by the tokens that want them most.

Source: arXiv:2407.19985 sec. 4.2 and eq. 3 (MoNE), on nested FFN prefixes instead of slices of the model dimension.
Differs: capacities in closed form instead of SLSQP. Shapes: T tokens, N sequences, C context, E levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moesaic.sparse.levels import LevelRule, level_blocks
from moesaic.sparse.select import RoutingContext

__all__ = ["PriorityLevels", "level_capacities", "preferred_levels"]

_DELTA, _BETA = 2.0, 10.0  # the paper's weights of the geometric preference and of the entropy


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorityLevels(LevelRule):
    """From the largest level down, each takes the share of a sequence's tokens that its capacity allows.

    Capacities follow from `mean_share` (see `level_capacities`), preferences are the softmax of the E scores. A token's
    level depends on the rest of its sequence, so this is no rule for decoding. Raises ValueError for a share outside
    0..1.
    """

    mean_share: float

    knob: ClassVar[str] = "mean_share"
    causal: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True  # not the share, but the controls' scores know no preference: they are matched

    def __post_init__(self) -> None:
        if not 0 < self.mean_share <= 1:
            raise ValueError(f"select.mean_share={self.mean_share} is outside 0..1 (0 excluded)")

    def level_T(self, score_TE: Tensor, context: RoutingContext) -> Tensor:
        levels_E = level_blocks(self.levels, context.num_blocks)
        capacity_E = level_capacities([n / levels_E[-1] for n in levels_E], self.mean_share)
        preference_NCE = score_TE.softmax(dim=1).unflatten(0, (context.num_sequences, -1))
        return preferred_levels(preference_NCE, capacity_E).flatten()


def preferred_levels(preference_NCE: Tensor, capacity_E: Sequence[float]) -> Tensor:
    """int64 (N, C): from the last level down, the floor(capacity C) free tokens that prefer it most; the rest level 0.

    Ties go to the earlier token.
    """
    length = preference_NCE.shape[1]
    level_NC = torch.zeros(preference_NCE.shape[:2], dtype=torch.int64, device=preference_NCE.device)
    for level in range(len(capacity_E) - 1, 0, -1):
        count = math.floor(capacity_E[level] * length + 1e-9)  # 0.29 * 100 is 28.99.. in floats
        wanted_NC = preference_NCE[..., level].masked_fill(level_NC > 0, -torch.inf)
        chosen = wanted_NC.sort(dim=1, descending=True, stable=True).indices[:, :count]
        level_NC = level_NC.scatter(1, chosen, level)
    return level_NC


def level_capacities(share_E: Sequence[float], share: float) -> list[float]:
    """c_E, the share of tokens of each level: sum c = 1, sum c w = `share` of the rising widths `share_E`.

    Maximises sum c_e / delta^e - beta sum c ln c (e from 0, delta 2, beta 10), whose solution is c_e proportional to
    exp((delta^-e + mu w_e) / beta) with mu found by bisection. ValueError for a share that no capacities give.
    """
    if not share_E[0] <= share <= share_E[-1]:
        raise ValueError(
            f"mean_share={share} cannot be reached: levels run {share_E[0]:g}..{share_E[-1]:g} of the FFN."
        )
    low, high = -1e5, 1e5
    for _ in range(200):
        mu = 0.5 * (low + high)
        capacity_E = _tilted(share_E, mu)
        mean = sum(c * w for c, w in zip(capacity_E, share_E, strict=True))
        low, high = (mu, high) if mean < share else (low, mu)
    return capacity_E


def _tilted(share_E: Sequence[float], mu: float) -> list[float]:
    exponent_E = [(_DELTA**-e + mu * w) / _BETA for e, w in enumerate(share_E)]
    weight_E = [math.exp(exponent - max(exponent_E)) for exponent in exponent_E]
    return [weight / sum(weight_E) for weight in weight_E]
