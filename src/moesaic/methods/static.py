"""The static front: what the same active width, or the same depth, gives without any routing.

Shapes: T tokens, D model dim, F FFN width, W kept neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.data.objective import forward
from moesaic.ffn.dense import DenseFFN
from moesaic.ffn.sites import find_ffns
from moesaic.methods.base import ConvertJob, Method
from moesaic.methods.calibration import Calibration
from moesaic.sparse.combine import Combine
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN
from moesaic.sparse.model import convert_model
from moesaic.sparse.partition import Importance, check_blocks
from moesaic.sparse.select import AllBlocks, Prefix, Selection
from moesaic.sparse.stats import NeuronStats

__all__ = ["StaticDepth", "StaticSlice", "block_influence", "slice_ffn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticSlice(Method):
    """The most important neurons at a fixed width for every token; the mean output of the rest becomes a bias.

    A budget is the number of blocks' worth of neurons kept, so that its points stand beside those of a routed method
    with the same `num_blocks`. Source: the static control that independent re-runs of conversion papers ask for.
    """

    num_blocks: int

    converts_per_budget: ClassVar[bool] = True

    @property
    def knob(self) -> str:
        return "blocks_kept"

    @property
    def blocks(self) -> int:
        return self.num_blocks

    def conversion(self) -> dict[str, Any]:
        return {"method": "StaticSlice", "num_blocks": self.num_blocks}

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if not (float(budget).is_integer() and 1 <= budget <= self.num_blocks):
                raise ValueError(f"method.budgets: {budget} is not a whole number in 1..num_blocks={self.num_blocks}")

    def check_width(self, width: int) -> None:
        check_blocks(width, self.num_blocks)

    def share(self, budget: float | None) -> float | None:
        return None if budget is None else budget / self.num_blocks

    def probe(self, job: ConvertJob) -> tuple[PreTrainedModel, Selection]:
        """Blocks in falling importance with their mean outputs: a prefix of them is the slice of that width."""
        assert job.calibration is not None
        partition = Importance(num_blocks=self.num_blocks, criterion="mean_abs_output")
        layers = []
        for site in find_ffns(job.model, job.pattern):
            ffn, inputs_TD = site.read(), job.calibration.inputs_TD(site.index)
            block_F = partition.labels(ffn, NeuronStats(ffn, inputs_TD), generator=torch.Generator())
            experts = Experts.from_dense(ffn, block_F)
            combine = Combine(fill="mean").build(ffn.dim, self.num_blocks)
            combine.initialise(experts, inputs_TD)
            layers.append(SparseFFN(experts, None, AllBlocks(), combine))
            site.release()
        return convert_model(job.model, layers, job.pattern), Prefix(k=self.num_blocks)

    def convert(self, job: ConvertJob) -> PreTrainedModel:
        assert job.calibration is not None
        assert job.budget is not None
        layers = []
        for site in find_ffns(job.model, job.pattern):
            ffn = site.read()
            share = job.budget / self.num_blocks if job.share_L is None else job.share_L[site.index]
            width = ffn.width // self.num_blocks * round(share * self.num_blocks)
            sliced = slice_ffn(ffn, job.calibration.inputs_TD(site.index), width)
            experts = Experts.from_dense(sliced, torch.zeros(width, dtype=torch.int64))
            layers.append(SparseFFN(experts, None, AllBlocks(), Combine().build(ffn.dim, 1)))
            site.release()
        return convert_model(job.model, layers, job.pattern)


def slice_ffn(ffn: DenseFFN, inputs_TD: Tensor, width: int) -> DenseFFN:
    """`ffn` with its `width` most important neurons; what the others give on average is added to the output bias.

    Importance of neuron i is mean |h_i| * ||down_i||, the size of what it adds to the output.
    """
    stats = NeuronStats(ffn, inputs_TD)
    mean_F, importance_F = stats.mean_activation(), stats.mean_abs_output()
    order_F = importance_F.argsort(descending=True, stable=True)
    kept_W, dropped = order_F[:width].sort().values, order_F[width:]
    bias_D = mean_F[dropped] @ ffn.down_FD[dropped].float()
    if ffn.down_bias_D is not None:
        bias_D = bias_D + ffn.down_bias_D.float()
    pick = lambda tensor: None if tensor is None else tensor[kept_W]  # noqa: E731
    return DenseFFN(
        gate_FD=pick(ffn.gate_FD),
        up_FD=ffn.up_FD[kept_W],
        down_FD=ffn.down_FD[kept_W],
        gate_bias_F=pick(ffn.gate_bias_F),
        up_bias_F=pick(ffn.up_bias_F),
        down_bias_D=bias_D.to(ffn.down_FD.dtype),
        activation=ffn.activation,
        dropout=ffn.dropout,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticDepth(Method):
    """Whole layers dropped: those that change the residual stream least on the calibration windows.

    A budget is the number of layers kept. Source: block influence, arXiv:2403.03853 (ShortGPT), eq. 1.
    """

    converts_per_budget: ClassVar[bool] = True

    @property
    def knob(self) -> str:
        return "layers_kept"

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if not (float(budget).is_integer() and budget >= 1):
                raise ValueError(f"method.budgets: {budget} is not a whole number of layers from 1")

    def convert(self, job: ConvertJob) -> PreTrainedModel:
        assert job.calibration is not None
        assert job.budget is not None
        stack = decoder_layers(job.model)
        keep = int(job.budget)
        if keep > len(stack):
            raise ValueError(
                f"method.budgets: {keep} layers kept, but the model has {len(stack)}. Allowed: 1..{len(stack)}."
            )
        influence = block_influence(job.model, stack, job.calibration)
        kept = sorted(influence.argsort(descending=True, stable=True)[:keep].tolist())
        layers = [stack[i] for i in kept]
        while len(stack):
            del stack[-1]
        for index, layer in enumerate(layers):
            renumber(layer, index)
            stack.append(layer)
        shorten_config(job.model.config, kept)
        return job.model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The one list of transformer layers of a decoder. Raises ValueError where there is not exactly one."""
    count = model.config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise ValueError(f"static_depth needs one list of {count} layers, {type(model).__name__} has {len(lists)}")
    return lists[0]


@torch.inference_mode()
def block_influence(
    model: PreTrainedModel, stack: nn.ModuleList, calibration: Calibration, *, max_windows: int = 16
) -> Tensor:
    """(num_layers,) 1 - mean cosine between a layer's input and output, float32, on up to `max_windows` windows."""
    total = torch.zeros(len(stack))
    num_windows = min(max_windows, calibration.num_windows)

    def note(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            total[index] += 1 - nn.functional.cosine_similarity(args[0].float(), after.float(), dim=-1).mean().item()

        return hook

    handles = [layer.register_forward_hook(note(i)) for i, layer in enumerate(stack)]
    try:
        for index in range(num_windows):
            forward(model, calibration.windows(index, index + 1))
    finally:
        for handle in handles:
            handle.remove()
    return total / num_windows


def renumber(layer: nn.Module, index: int) -> None:
    """Give every part of `layer` that indexes the KV cache its new place."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", index)  # noqa: B010  (not a declared attribute)


def shorten_config(config: Any, kept: list[int]) -> None:
    """Write the new depth into `config`, per-layer lists included."""
    for key in ("layer_types", "mlp_layer_types"):
        types = getattr(config, key, None)
        if types is not None:
            setattr(config, key, [types[i] for i in kept])
    config.num_hidden_layers = len(kept)
