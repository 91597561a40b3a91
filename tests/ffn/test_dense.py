"""DenseFFN against two nested loops written out here."""

import math

import pytest
import torch

from moesaic.ffn.dense import DenseFFN


def silu(z: float) -> float:
    return z / (1 + math.exp(-z))


def rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gated() -> DenseFFN:
    return DenseFFN(
        gate_FD=rows(5, 3, seed=0),
        up_FD=rows(5, 3, seed=1),
        down_FD=rows(5, 3, seed=2),
        gate_bias_F=rows(5, seed=3),
        up_bias_F=rows(5, seed=4),
        down_bias_D=rows(3, seed=5),
        activation="silu",
    )


def test_gated_ffn_equals_loops_over_neurons() -> None:
    ffn = gated()
    x_TD = rows(4, 3, seed=6)
    expected_TD = torch.zeros(4, 3)
    for t in range(4):
        expected_TD[t] = ffn.down_bias_D
        for f in range(5):
            gate = sum(float(x_TD[t, d] * ffn.gate_FD[f, d]) for d in range(3)) + float(ffn.gate_bias_F[f])
            up = sum(float(x_TD[t, d] * ffn.up_FD[f, d]) for d in range(3)) + float(ffn.up_bias_F[f])
            expected_TD[t] += silu(gate) * up * ffn.down_FD[f]
    torch.testing.assert_close(ffn(x_TD), expected_TD, rtol=1e-5, atol=1e-5)


def test_plain_ffn_equals_loops_over_neurons() -> None:
    ffn = DenseFFN(gate_FD=None, up_FD=rows(5, 3, seed=1), down_FD=rows(5, 3, seed=2), activation="relu")
    x_TD = rows(4, 3, seed=6)
    expected_TD = torch.zeros(4, 3)
    for t in range(4):
        for f in range(5):
            expected_TD[t] += max(0.0, float(x_TD[t] @ ffn.up_FD[f])) * ffn.down_FD[f]
    torch.testing.assert_close(ffn(x_TD), expected_TD, rtol=1e-5, atol=1e-5)


def test_sizes_and_leading_dimensions() -> None:
    ffn = gated()
    assert (ffn.dim, ffn.width, ffn.gated) == (3, 5, True)
    assert ffn.hidden(torch.zeros(2, 7, 3)).shape == (2, 7, 5)
    assert ffn(torch.zeros(2, 7, 3)).shape == (2, 7, 3)
    assert ffn(torch.zeros(0, 3)).shape == (0, 3)


def test_float32_down_matrix_behind_half_precision() -> None:
    """T5 loads its `wo` in float32 whatever the rest is."""
    up_FD = rows(5, 3, seed=1).bfloat16()
    ffn = DenseFFN(gate_FD=None, up_FD=up_FD, down_FD=rows(5, 3, seed=2), activation="relu")
    assert ffn(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_FD": torch.zeros(3, 5)}, r"down_FD has shape \(3, 5\), but up_FD says \(5, 3\)"),
        ({"activation": "silu2"}, "unknown activation 'silu2'"),
        ({"gate_FD": None}, "gate_bias_F is given without gate_FD"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    fields = {name: getattr(gated(), name) for name in DenseFFN.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        DenseFFN(**{**fields, **change})
