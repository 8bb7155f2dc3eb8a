"""Low-rank updates of rows with different adapters: shrink to the rank, then widen and add.

No sorting: a tile of rows looks at every slot and passes over those that none of its rows has, so the cost grows with
the adapters that meet in a tile, and the launch depends on shapes alone.

Legend: low: (tokens, rank) float32, a row's x @ a of its own slot.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelport.kernels.gpu.attention import dot


@triton.jit
def _shrink(
    x, rows, a, low, tokens, rank, k, x_row, a_slot, a_row, ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.program_id(1)
    mine = tl.load(rows + row, mask=row < tokens, other=-1) == slot
    if tl.sum(mine.to(tl.int32), 0) > 0:
        inner, r = tl.arange(0, BLOCK), tl.arange(0, RANK)
        at_x = x + row.to(tl.int64)[:, None] * x_row + inner[None, :]
        at_a = a + slot.to(tl.int64) * a_slot + r[None, :] * a_row + inner[:, None]
        sums = tl.zeros((ROWS, RANK), tl.float32)
        for start in range(0, k, BLOCK):
            left = tl.load(at_x + start, mask=mine[:, None] & (inner < k - start)[None, :], other=0.0)
            right = tl.load(at_a + start, mask=(r < rank)[None, :] & (inner < k - start)[:, None], other=0.0)
            sums = dot(left, right.to(x.dtype.element_ty), sums)
        tl.store(low + row[:, None] * rank + r[None, :], sums, mask=mine[:, None] & (r < rank)[None, :])


@triton.jit
def _expand(
    low, rows, b, residual, out, tokens, slots, rank, n, b_slot, b_row, residual_row, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, RANK)
    of_row = tl.load(rows + row, mask=row < tokens, other=-1)
    wide = row.to(tl.int64)[:, None]
    mask = (row < tokens)[:, None] & (column < n)[None, :]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    if RESIDUAL:
        sums = tl.load(residual + wide * residual_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    for slot in range(0, slots):
        mine = of_row == slot
        if tl.sum(mine.to(tl.int32), 0) > 0:
            left = tl.load(low + wide * rank + r[None, :], mask=mine[:, None] & (r < rank)[None, :], other=0.0)
            at_b = b + tl.full((1,), slot, tl.int64) * b_slot + r[:, None] * b_row + column[None, :]
            right = tl.load(at_b, mask=(r < rank)[:, None] & (column < n)[None, :], other=0.0)
            sums = dot(left, right, sums)
    tl.store(out + wide * n + column[None, :], sums.to(out.dtype.element_ty), mask=mask)


def lora(x: Tensor, rows: Tensor, a: Tensor, b: Tensor, residual: Tensor | None = None) -> Tensor:
    """residual + x @ a[slot].T @ b[slot] of each row's slot -> (tokens, out), in x.dtype.

    x: (tokens, in); rows: (tokens,) int32 slots, -1 for none; a: (slots, rank, in); b: (slots, rank, out), scaled;
    residual: (tokens, out). Last dimensions are dense.
    """
    (tokens, k), (slots, rank, n) = x.shape, b.shape
    out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    low = torch.empty((tokens, rank), dtype=torch.float32, device=x.device)
    wide, some = max(16, triton.next_power_of_2(rank)), 16 if tokens <= 256 else 64
    if slots:
        _shrink[(triton.cdiv(tokens, some), slots)](
            x, rows, a, low, tokens, rank, k, x.stride(0), a.stride(0), a.stride(1), ROWS=some, RANK=wide, BLOCK=128,
            num_stages=2 if x.dtype == torch.float32 else 3,
        )  # fmt: skip
    _expand[(triton.cdiv(tokens, some), triton.cdiv(n, 128))](
        low, rows, b, x if residual is None else residual, out, tokens, slots, rank, n, b.stride(0), b.stride(1),
        0 if residual is None else residual.stride(0), RESIDUAL=residual is not None, ROWS=some, RANK=wide, BLOCK=128,
    )  # fmt: skip
    return out
