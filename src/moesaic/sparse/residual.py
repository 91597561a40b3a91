"""The residual stream that the output of each sparse FFN is added to, seen from outside the model.

Shapes: L sparse layers, T tokens, D model dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.sparse.layer import SparseFFN, sparse_layers

__all__ = ["capture_residuals", "residual_norms"]


@torch.no_grad()
def residual_norms(model: nn.Module, batch: Mapping[str, Tensor]) -> list[nn.Module]:
    """Per sparse layer, the norm before it, whose input is the residual stream: found by one forward of `batch`.

    Raises ValueError for a model that adds the FFN's output to something else: norms after it, parallel attention.
    """
    made: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}  # by identity of the output, which is kept alive here
    norms: list[nn.Module] = []
    inputs: list[Tensor] = []
    sums: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            made[id(output)] = (module, args[0], output)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        norm, stream, _ = made.get(id(args[0]), (None, None, None))
        if norm is None or stream is None:
            raise ValueError(
                f"similarity=resid_cos: {type(model).__name__} gives its FFNs no norm's output. {_WAY_OUT}"
            )
        norms.append(norm)
        inputs.append(stream)

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        sums.append((inputs[-1] + output.view_as(inputs[-1])).flatten())

    handles = [m.register_forward_hook(note) for m in model.modules() if not isinstance(m, SparseFFN)]
    for layer in sparse_layers(model):
        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    # Flat, because OPT folds sequences for its FFN and unfolds them after the sum.
    streams = [stream.flatten() for _, given, output in made.values() for stream in (given, output)]
    for total in sums:
        if not any(s.shape == total.shape and torch.allclose(s, total, atol=1e-5, rtol=1e-3) for s in streams):
            raise ValueError(
                f"similarity=resid_cos: {type(model).__name__} adds an FFN's output to something else than the input "
                f"of the norm before it. {_WAY_OUT}"
            )
    return norms


@contextmanager
def capture_residuals(norms: Sequence[nn.Module], residual_L: dict[int, Tensor]) -> Iterator[None]:
    """While open, each forward leaves in `residual_L` the stream (T, D) of every layer before that layer runs."""

    def listener(index: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            residual_L[index] = args[0].detach().reshape(-1, args[0].shape[-1])

        return keep

    handles = [norm.register_forward_pre_hook(listener(index)) for index, norm in enumerate(norms)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_WAY_OUT = "Use rel_mse, cos or proj, which need no residual stream."
