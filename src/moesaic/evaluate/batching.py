"""How many sequences may share a forward call without changing each other's result."""

from __future__ import annotations

from transformers import PreTrainedModel

from moesaic.sparse.layer import sparse_layers

__all__ = ["independent_batch_size"]


def independent_batch_size(model: PreTrainedModel, batch_size: int) -> int:
    """`batch_size`, or 1 where a layer selects blocks over the whole batch.

    Such a selection would see the neighbours, and lm-eval's padding, which comes without an attention mask.
    """
    return batch_size if all(layer.select.causal for layer in sparse_layers(model)) else 1
