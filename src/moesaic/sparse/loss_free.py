"""Balance without a loss: a bias per block that only the choice sees moves towards equal loads.

Source: arXiv:2408.15664. Shapes: T tokens, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic.sparse.routing import Routing
from moesaic.sparse.select import RoutingContext, TopK

__all__ = ["BlockBias", "LossFreeTopK"]


class BlockBias(nn.Module):
    """The bias of each block, a buffer: it has no gradient and no weight decay."""

    bias_B: Tensor

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.register_buffer("bias_B", torch.zeros(num_blocks))

    @torch.no_grad()
    def update(self, counts_B: Tensor, step: float) -> None:
        """Raise the bias of blocks below the mean load by `step`, lower that of those above it."""
        load_B = counts_B.float()
        self.bias_B.add_(step * (load_B.mean() - load_B).sign())


@dataclass(frozen=True, kw_only=True, slots=True)
class LossFreeTopK(TopK):
    """The k best blocks by score plus bias; the bias moves by `step` after each training batch.

    `cosine`: scores are cosines, of standard deviation 1/sqrt(D), and the step is scaled by that. Weights, which come
    from the combination, never see the bias.
    """

    step: float = 1e-3
    cosine: bool = False

    def __post_init__(self) -> None:
        super(LossFreeTopK, self).__post_init__()
        if self.always:
            raise ValueError(f"select.always={self.always} is not supported with a bias. Use TopK, or always: 0.")

    def state(self, num_blocks: int) -> BlockBias:
        return BlockBias(num_blocks)

    def __call__(self, score_TB: Tensor, context: RoutingContext | None = None) -> Routing:
        memory = context.state if context is not None else None
        if context is None or not isinstance(memory, BlockBias):  # outside a layer: nothing was learned yet
            return super(LossFreeTopK, self).__call__(score_TB, context)
        routing = super(LossFreeTopK, self).__call__(score_TB.detach() + memory.bias_B, context)
        if context.training:
            assert context.dim is not None
            memory.update(routing.counts_B, self.step * (context.dim**-0.5 if self.cosine else 1.0))
        return routing
