import functools

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from moesaic.ffn.activations import activation_name


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.SiLU(), "silu"),
        (nn.functional.relu, "relu"),
        (functools.partial(nn.functional.gelu, approximate="tanh"), "gelu_pytorch_tanh"),
        (ACT2FN["gelu_10"], "gelu_10"),
        (ACT2FN["relu6"], "relu6"),
        (nn.Identity(), "linear"),
    ],
)
def test_name_by_value(function: object, name: str) -> None:
    assert activation_name(function) == name


def test_activation_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of gelu, gelu_10"):
        activation_name(torch.square)
