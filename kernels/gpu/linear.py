"""Products with weights that are smaller than the activations: widened in registers, so that memory sees the codes.

Decode is bound by the bytes of the weight, so a few rows make tall thin tiles, of which there are enough to keep all
multiprocessors reading. Weights of the activations' own type go to cuBLAS instead (`modelport.kernels.linear`).

Legend: x: (M, K), codes: (N, K) int8, 8-bit floats or any float; scales: (N,) float32, on the sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelport.kernels.gpu.attention import WIDE, dot


@triton.jit
def widen(codes, KIND: tl.constexpr):
    """Codes in the activations' type, exact."""
    if WIDE:  # the interpreter makes no bfloat16 of integers
        return codes.to(tl.float32)
    else:
        return codes.to(KIND)


@triton.jit
def _linear(
    x, codes, scales, bias, residual, out, m, n, k, x_row, code_row, residual_row, SCALED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    at_x = x + row[:, None] * x_row + inner[None, :]
    at_codes = codes + column[None, :] * code_row + inner[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        left = tl.load(at_x + start, mask=(row < m)[:, None] & (inner < k - start)[None, :], other=0.0)
        right = tl.load(at_codes + start, mask=(column < n)[None, :] & (inner < k - start)[:, None], other=0.0)
        sums = dot(left, widen(right, x.dtype.element_ty), sums)
    mask = (row < m)[:, None] & (column < n)[None, :]
    if SCALED:
        sums *= tl.load(scales + column, mask=column < n, other=0.0)[None, :]
    if BIAS:
        sums += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        sums += tl.load(residual + row[:, None] * residual_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * n + column[None, :], sums.to(out.dtype.element_ty), mask=mask)


def tiles(rows: int, exact: bool) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages for so many rows; `exact` for float32, whose tiles are smaller."""
    if exact:
        return (16, 32, 64, 4, 2) if rows <= 16 else (32, 64, 32, 4, 2)
    if rows <= 16:
        return 16, 32, 256, 4, 4
    if rows <= 64:
        return max(16, triton.next_power_of_2(rows)), 64, 128, 4, 4
    return 128, 128, 64, 8, 3


def linear(
    x: Tensor, codes: Tensor, scales: Tensor | None, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """As `modelport.kernels.linear.linear` for codes: (out, in) and scales: (out,)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (m, k), n = x.shape, codes.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    if not out.numel():
        return out
    block_m, block_n, block_k, warps, stages = tiles(m, x.dtype == torch.float32)
    _linear[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        x, codes, x if scales is None else scales, x if bias is None else bias, x if residual is None else residual,
        out, m, n, k, x.stride(0), codes.stride(0), 0 if residual is None else residual.stride(0),
        SCALED=scales is not None, BIAS=bias is not None, RESIDUAL=residual is not None, BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
