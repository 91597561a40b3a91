"""The weights of one dense FFN, neuron by neuron, whatever the model family calls and stores them.

Shapes: T tokens, D model dim, F FFN width (number of neurons). Row i of every matrix belongs to neuron i.
"""

import difflib
from dataclasses import dataclass

import torch.nn.functional as nnf
from torch import Tensor
from transformers.activations import ACT2FN

__all__ = ["DenseFFN"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DenseFFN:
    """One dense FFN: `down^T h + b` with `h = act(up x + b)`, or gated `h = act(gate x + b) * (up x + b)`.

    `gate_FD` is None in a plain FFN; biases are None where the model has none. `activation` is a name in transformers'
    `ACT2FN`. `dropout` is the fraction that the replaced module itself drops in training, of its hidden activations
    (T5) or its output (GPT-2); it is told here and not applied. Raises ValueError for shapes that do not fit.
    """

    gate_FD: Tensor | None
    up_FD: Tensor
    down_FD: Tensor
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None
    activation: str
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in ACT2FN:
            nearest = difflib.get_close_matches(self.activation, ACT2FN, n=1, cutoff=0.0)[0]
            known = ", ".join(sorted(ACT2FN))
            raise ValueError(f"unknown activation {self.activation!r}; did you mean {nearest!r}? There are {known}")
        if self.gate_FD is None and self.gate_bias_F is not None:
            raise ValueError("gate_bias_F is given without gate_FD: a plain FFN has its bias in up_bias_F")
        matrix, row, column = (self.width, self.dim), (self.width,), (self.dim,)
        for name, tensor, shape in (
            ("gate_FD", self.gate_FD, matrix),
            ("down_FD", self.down_FD, matrix),
            ("gate_bias_F", self.gate_bias_F, row),
            ("up_bias_F", self.up_bias_F, row),
            ("down_bias_D", self.down_bias_D, column),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but up_FD says {shape}")

    @property
    def dim(self) -> int:
        """D, the width of the residual stream."""
        return self.up_FD.shape[1]

    @property
    def width(self) -> int:
        """F, the number of neurons."""
        return self.up_FD.shape[0]

    @property
    def gated(self) -> bool:
        """Whether hidden activations are a product of a gate and an up branch (SwiGLU and its kin)."""
        return self.gate_FD is not None

    def hidden(self, x_TD: Tensor) -> Tensor:
        """Hidden activations h (..., F), what the down matrix is multiplied with, in the dtype of the weights."""
        up_TF = nnf.linear(x_TD, self.up_FD, self.up_bias_F)
        act = ACT2FN[self.activation]
        if self.gate_FD is None:
            return act(up_TF)
        return act(nnf.linear(x_TD, self.gate_FD, self.gate_bias_F)) * up_TF

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The FFN's output (..., D), output bias included, without dropout."""
        # T5 keeps its down matrix in float32 when the rest is half precision.
        h_TF = self.hidden(x_TD).to(self.down_FD.dtype)
        return nnf.linear(h_TF, self.down_FD.mT, self.down_bias_D)
