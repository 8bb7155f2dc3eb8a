"""RMS and layer norm: one read and one write of each row, several short rows to a program.

Legend: a row is (i, j) of an x (outer, inner, width) whose first two strides are free; BLOCK: power of two >= width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm(
    x, weight, bias, out, rows, inner, outer_stride, inner_stride, weight_stride, width, eps, offset,
    CENTRE: tl.constexpr, ROUND: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < width)
    i, j = row // inner, row % inner
    wide = tl.load(x + i * outer_stride + j * inner_stride + column, mask=mask, other=0.0).to(tl.float32)
    if CENTRE:
        wide = tl.where(mask, wide - tl.sum(wide, 1)[:, None] / width, 0.0)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1)[:, None] / width + eps)
    if ROUND:  # Llama rounds before the weight
        normed = normed.to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + j * weight_stride + column, mask=mask, other=0.0).to(tl.float32)
    result = normed * (offset + factor)
    if BIAS:
        result += tl.load(bias + j * weight_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float, centre: bool, rounds: bool
) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.dim() == 3:
        inner, outer_stride, inner_stride = x.shape[1], x.stride(0), x.stride(1)
    else:
        x = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
        inner, outer_stride, inner_stride = 1, x.stride(0), 0
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = out.numel() // width
    if rows:
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        block = triton.next_power_of_2(width)
        several = max(1, min(16, 2048 // block))
        _norm[(triton.cdiv(rows, several),)](
            x, weight, weight if bias is None else bias, out, rows, inner, outer_stride, inner_stride,
            width if weight.dim() == 2 else 0, width, eps, offset, CENTRE=centre, ROUND=rounds, BIAS=bias is not None,
            ROWS=several, BLOCK=block, num_warps=min(16, max(4, block // 1024)),
        )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """As `modelport.kernels.norm.rms_norm`."""
    return _launch(x, weight, None, eps, offset, centre=False, rounds=not offset).view(x.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `modelport.kernels.norm.layer_norm`."""
    return _launch(x, weight, bias, eps, 0.0, centre=True, rounds=False).view(x.shape)
