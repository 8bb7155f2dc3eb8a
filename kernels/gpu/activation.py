"""Activations, alone and as a gate; `apply` serves the experts' kernel too.

Codes are those of `modelport.kernels.activation` and of the experts (6: gpt-oss's).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def apply(x, CODE: tl.constexpr):
    """act(x) of a float32 tensor."""
    if CODE == 0:  # silu
        result = x * tl.sigmoid(x)
    elif CODE == 1:  # gelu
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif CODE == 2:  # gelu_tanh, since (1 + tanh(u)) / 2 = sigmoid(2 u)
        result = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif CODE == 3:  # quick_gelu
        result = x * tl.sigmoid(1.702 * x)
    elif CODE == 4:  # relu; a NaN stays one
        result = tl.where(x < 0, 0.0, x)
    else:  # relu2
        result = tl.where(x < 0, 0.0, x * x)
    return result


@triton.jit
def _activate(x, out, count, CODE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, apply(value, CODE).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated(x, out, stride, width, CODE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (apply(gate, CODE) * up).to(out.dtype.element_ty), mask=mask)


def activate(x: Tensor, code: int) -> Tensor:
    """As `modelport.kernels.activation.activate`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _activate[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), CODE=code, BLOCK=BLOCK)
    return out


def gated(x: Tensor, code: int) -> Tensor:
    """As `modelport.kernels.activation.gated`, x: (..., 2 * width)."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (rows.shape[0], triton.cdiv(width, BLOCK))
        _gated[grid](rows, out, rows.stride(0), width, CODE=code, BLOCK=BLOCK)
    return out
