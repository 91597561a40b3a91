"""Selections that look at the whole batch are evaluated one sequence at a time."""

from typing import ClassVar

import pytest
import torch
from bench.toy import sparse_toy
from torch import Tensor
from toys import tiny_model

from moesaic.evaluate.batching import independent_batch_size
from moesaic.sparse.routing import Routing
from moesaic.sparse.select import RoutingContext, Selection, TopK


class ExpertChoice(Selection):
    """Every block takes its best token of the batch."""

    causal: ClassVar[bool] = False

    def __call__(self, score_TB: Tensor, context: RoutingContext | None = None) -> Routing:
        best_B = score_TB.argmax(dim=0)
        active_TB = torch.zeros_like(score_TB, dtype=torch.bool)
        return Routing.from_mask(active_TB.index_put((best_B, torch.arange(len(best_B))), torch.tensor(True)))


@pytest.mark.parametrize(("select", "batch_size"), [(TopK(k=1), 16), (ExpertChoice(), 1)])
def test_batch_size_by_selection(select: Selection, batch_size: int) -> None:
    assert independent_batch_size(sparse_toy(select=select), 16) == batch_size


def test_a_dense_model_takes_any_batch() -> None:
    assert independent_batch_size(tiny_model("llama"), 16) == 16
