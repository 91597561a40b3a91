"""The `grouped` executor: one grouped matrix product per weight, over tokens sorted by block.

Shapes: T tokens, D model dim, B blocks, S neurons per block, N assignments, K and M inner and outer size of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.sparse.experts import Experts
from moesaic.sparse.routing import Routing

__all__ = ["GROUPED_DTYPES", "grouped", "row_multiple", "sum_by_token"]

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STRIDE_BYTES = 16  # grouped_mm wants every row stride to be a multiple of this, on CPU too


def grouped(x_TD: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """Weighted sum (T, D) of the routed blocks' outputs, without the output bias.

    Sizes that break grouped_mm's stride rule are padded with zero neurons (a copy of the weights at each call).
    Raises ValueError for a dtype that grouped_mm has no kernel for.
    """
    x_TD = _in_compute_dtype(x_TD)
    if x_TD.dtype not in GROUPED_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in GROUPED_DTYPES)
        raise ValueError(
            f"executor=grouped got {str(x_TD.dtype).removeprefix('torch.')}, but grouped_mm knows only {allowed}. "
            "Use executor=loop or executor=masked."
        )
    end_B = routing.counts_B.cumsum(0).to(torch.int32)
    x_ND = x_TD.index_select(0, routing.token_N)
    up_NS = _product(x_ND, experts.up_BSD.mT, end_B, _bias(experts.up_bias_BS, routing))
    if experts.gate_BSD is None:
        h_NS = experts.act(up_NS)
    else:
        h_NS = experts.act(_product(x_ND, experts.gate_BSD.mT, end_B, _bias(experts.gate_bias_BS, routing))) * up_NS
    h_NS = experts.as_down(h_NS * routing.weight_N[:, None].to(h_NS.dtype))
    return sum_by_token(_product(h_NS, experts.down_BSD, end_B, None), routing)


def sum_by_token(out_ND: Tensor, routing: Routing) -> Tensor:
    """(T, D): the rows of each token added up, in float32 at least, returned in the dtype of `out_ND`."""
    wide = torch.promote_types(out_ND.dtype, torch.float32)
    sum_TD = out_ND.new_zeros(routing.num_tokens, out_ND.shape[1], dtype=wide)
    return sum_TD.index_add(0, routing.token_N, out_ND.to(wide)).to(out_ND.dtype)


def row_multiple(dtype: torch.dtype) -> int:
    """What D and S must be multiples of for grouped_mm to run without padding: 4 in float32, 8 in half precision."""
    return _STRIDE_BYTES // dtype.itemsize


def _in_compute_dtype(x: Tensor) -> Tensor:
    # Autocast does not know grouped_mm, so its cast is done here.
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _bias(bias_BS: Tensor | None, routing: Routing) -> Tensor | None:
    return None if bias_BS is None else bias_BS.index_select(0, routing.block_N)


def _product(x_NK: Tensor, w_BKM: Tensor, end_B: Tensor, bias_NM: Tensor | None) -> Tensor:
    multiple = row_multiple(x_NK.dtype)
    pad_K, pad_M = -w_BKM.shape[1] % multiple, -w_BKM.shape[2] % multiple
    w_BKM = w_BKM.to(x_NK.dtype)
    if pad_K or pad_M:
        x_NK, w_BKM = F.pad(x_NK, (0, pad_K)), F.pad(w_BKM, (0, pad_M, 0, pad_K))
    multiply = _compiled_mm if torch.compiler.is_compiling() else _eager_mm
    out_NM = multiply(x_NK, w_BKM, end_B)
    if pad_M:
        out_NM = out_NM[:, : out_NM.shape[1] - pad_M]
    return out_NM if bias_NM is None else out_NM + bias_NM.to(out_NM.dtype)


def _eager_mm(x_NK: Tensor, w_BKM: Tensor, end_B: Tensor) -> Tensor:
    return F.grouped_mm(x_NK, w_BKM, offs=end_B)


# PyTorch's own operator has a fake kernel for bfloat16 only, so float32 dies under torch.compile; this one has both.
@torch.library.custom_op("moesaic::grouped_mm", mutates_args=())
def _compiled_mm(x_NK: Tensor, w_BKM: Tensor, end_B: Tensor) -> Tensor:
    return F.grouped_mm(x_NK, w_BKM, offs=end_B)


@torch.library.custom_op("moesaic::grouped_outer", mutates_args=())
def _compiled_outer(x_NK: Tensor, g_NM: Tensor, end_B: Tensor) -> Tensor:
    return F.grouped_mm(x_NK.t(), g_NM, offs=end_B)


@_compiled_mm.register_fake
def _(x_NK: Tensor, w_BKM: Tensor, end_B: Tensor) -> Tensor:
    return x_NK.new_empty(x_NK.shape[0], w_BKM.shape[2])


@_compiled_outer.register_fake
def _(x_NK: Tensor, g_NM: Tensor, end_B: Tensor) -> Tensor:
    return x_NK.new_empty(end_B.shape[0], x_NK.shape[1], g_NM.shape[1])


def _keep_operands(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, g_NM: Tensor) -> tuple[Tensor, Tensor, None]:
    x_NK, w_BKM, end_B = ctx.saved_tensors  # type: ignore[attr-defined]
    g_NM = g_NM.contiguous()
    return _compiled_mm(g_NM, w_BKM.mT, end_B), _compiled_outer(x_NK, g_NM, end_B), None


_compiled_mm.register_autograd(_backward, setup_context=_keep_operands)
