"""Before the clock starts: every sparse layer must give what the reference executor gives, on the tokens to be timed.

Layers are compared one by one on the same inputs. Whole models would differ for an honest reason: rounding in one layer
can change which blocks the next one selects.
Shapes: T tokens, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.sparse.layer import SparseFFN

__all__ = ["REFERENCE", "OutputMismatchError", "check_outputs", "relative_error"]

REFERENCE = "masked"
# Largest error of one token, relative to the size of an average token's output.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class OutputMismatchError(RuntimeError):
    """An executor computes something else than the reference: its time would mean nothing."""


def check_outputs(layers: Sequence[SparseFFN], call: Callable[[], object]) -> None:
    """Run `call` once and compare every layer's output with the reference executor's, at every forward of the layer.

    Raises: OutputMismatchError with layer, executor and size of the difference.
    """
    with _compared(layers):
        call()


def relative_error(y_TD: Tensor, reference_TD: Tensor) -> float:
    """Norm of the worst token's difference over the root mean square norm of the reference's tokens."""
    reference_TD = reference_TD.double().flatten(0, -2)
    worst = (y_TD.double().flatten(0, -2) - reference_TD).norm(dim=-1).max()
    typical = reference_TD.norm(dim=-1).square().mean().sqrt()
    return 0.0 if worst == 0 else (worst / typical).item()


@contextmanager
def _compared(layers: Sequence[SparseFFN]) -> Iterator[None]:
    handles = [layer.register_forward_hook(_compare(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compare(index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(layer, SparseFFN)
        timed, layer.executor = layer.executor, REFERENCE
        try:
            reference = layer.forward(*args)  # not layer(...), which would come back here
        finally:
            layer.executor = timed
        error, allowed = relative_error(output, reference), TOLERANCE[output.dtype]
        if not error <= allowed:
            raise OutputMismatchError(
                f"layer {index}: executor {timed} differs from {REFERENCE} by {error:.2g} of the output (allowed: "
                f"{allowed:.2g}, {output.dtype}). It is not timed; report this, and use another executor meanwhile."
            )

    return hook
