"""Random FFNs and brute-force block outputs for tests of the sparse components."""

import torch
from torch import Tensor

from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.experts import Experts
from moesaic.sparse.partition import Random

__all__ = ["block_outputs", "random_experts", "random_ffn", "random_inputs"]


def random_ffn(
    *, dim: int = 8, width: int = 24, gated: bool = True, bias: bool = False, activation: str = ""
) -> DenseFFN:
    """A seeded FFN with std 1/sqrt(fan-in) weights: SwiGLU when gated, else plain ReLU, unless `activation` says."""
    generator = torch.Generator().manual_seed(dim * 1000 + width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return DenseFFN(
        gate_FD=draw(width, dim) * dim**-0.5 if gated else None,
        up_FD=draw(width, dim) * dim**-0.5,
        down_FD=draw(width, dim) * width**-0.5,
        gate_bias_F=draw(width) if gated and bias else None,
        up_bias_F=draw(width) if bias else None,
        down_bias_D=draw(dim) if bias else None,
        activation=activation or ("silu" if gated else "relu"),
    )


def random_experts(ffn: DenseFFN, num_blocks: int, seed: int = 0) -> Experts:
    """`ffn` cut at random."""
    generator = torch.Generator().manual_seed(seed)
    return Experts.from_dense(ffn, Random(num_blocks=num_blocks).labels(ffn, None, generator=generator))


def random_inputs(num_tokens: int, dim: int = 8, seed: int = 1) -> Tensor:
    """(T, D) standard normal inputs."""
    return torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(seed))


def block_outputs(experts: Experts, x_TD: Tensor) -> Tensor:
    """(T, B, D) output of every block for every token, output bias excluded, by two nested loops in float64."""
    ffn = experts.dense_ffn()
    size = experts.block_size
    out_TBD = torch.zeros(len(x_TD), experts.num_blocks, experts.dim, dtype=torch.float64)
    with torch.no_grad():
        h_TF, down_FD = ffn.hidden(x_TD).double(), ffn.down_FD.double()
        for t in range(len(x_TD)):
            for b in range(experts.num_blocks):
                out_TBD[t, b] = h_TF[t, b * size : (b + 1) * size] @ down_FD[b * size : (b + 1) * size]
    return out_TBD
