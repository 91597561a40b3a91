"""Which of transformers' named activations a live activation module computes."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from transformers.activations import ACT2FN

__all__ = ["activation_name"]

# These have learned parameters, which a name cannot carry.
_LEARNED = frozenset({"prelu", "xielu"})


def activation_name(function: Callable[[Tensor], Tensor]) -> str:
    """The first name in `ACT2FN` whose values equal those of `function` on a grid over -20..20.

    By value and not by class: families hold modules, plain functions and partials for one and the same activation.
    Raises ValueError if none does (or if the activation has learned parameters).
    """
    values = _values(function)
    for name, known in _known_values().items():
        if torch.equal(values, known):
            return name
    allowed = ", ".join(sorted(set(ACT2FN) - _LEARNED))
    raise ValueError(
        f"{function!r} computes none of the activations that transformers names; it must be one of {allowed}"
    )


def _values(function: Callable[[Tensor], Tensor]) -> Tensor:
    # On the CPU even under `torch.device("meta")` (activations hold no tensors), and in float32 even while transformers
    # loads a bfloat16 model with that as the default dtype.
    with torch.no_grad():
        return function(torch.linspace(-20, 20, 401, dtype=torch.float32, device="cpu"))


@cache
def _known_values() -> dict[str, Tensor]:
    return {name: _values(ACT2FN[name]) for name in ACT2FN if name not in _LEARNED}
