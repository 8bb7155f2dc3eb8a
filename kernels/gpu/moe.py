"""The experts as two grouped matrix products: choices sorted by expert, every used expert's weights read once a tile.

The launch depends on shapes alone: it has as many tiles as there could be, and those without rows end at once. The
second product leaves one float32 row for each choice, and a third kernel adds a token's rows and the residual, in the
order of the choices, so that a result does not depend on who came first.

Legend: choices = tokens * chosen; order: (choices,) int32, choices sorted by expert; starts: (experts + 1,) int32, the
first of each expert in `order`; ends: (experts,) int32, tiles of an expert and of all before it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelport.kernels.gpu.activation import apply
from modelport.kernels.gpu.attention import dot
from modelport.kernels.gpu.linear import tiles, widen

FEW = 1024  # choices that one program sorts faster than a sorting library starts


@triton.jit
def _route(
    ids, order, starts, ends, choices, experts, ROWS: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr
):  # fmt: skip
    expert = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, choices, BLOCK):
        choice = first + tl.arange(0, BLOCK)
        chosen = tl.load(ids + choice, mask=choice < choices, other=-1).to(tl.int32)
        counts += tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), 0)
    running = tl.cumsum(counts, 0) - counts
    tl.store(starts + expert, running, mask=expert < experts)
    tl.store(starts + experts, tl.sum(counts, 0))
    tl.store(ends + expert, tl.cumsum((counts + ROWS - 1) // ROWS, 0), mask=expert < experts)
    for first in range(0, choices, BLOCK):
        choice = first + tl.arange(0, BLOCK)
        chosen = tl.load(ids + choice, mask=choice < choices, other=-1).to(tl.int32)
        is_it = (chosen[:, None] == expert[None, :]).to(tl.int32)
        place = tl.sum(is_it * (running[None, :] + tl.cumsum(is_it, 0) - 1), 1)
        tl.store(order + place, choice, mask=(chosen >= 0) & (chosen < experts))
        running += tl.sum(is_it, 0)


@triton.jit
def _rows_of(tile, starts, ends, experts, ROWS: tl.constexpr):
    """The expert of a tile, its places in `order`, and which of them there are; no place past the last tile."""
    low, high = tile * 0, experts
    while high > low:
        middle = (low + high) // 2
        past = tl.load(ends + middle) <= tile
        low, high = tl.where(past, middle + 1, low), tl.where(past, high, middle)
    expert = tl.minimum(low, experts - 1)
    before = tl.load(ends + tl.maximum(expert - 1, 0))
    place = tl.load(starts + expert) + (tile - tl.where(expert > 0, before, 0)) * ROWS + tl.arange(0, ROWS)
    return expert, place, (place < tl.load(starts + expert + 1)) & (low < experts)


@triton.jit
def _multiply(
    x, row, there, weight, scales, bias, column, n, k, x_row, weight_row, sums, SCALED: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of x times one matrix, with its scales and bias: (rows, columns) float32; `sums` are zeros."""
    inner = tl.arange(0, BLOCK_K)
    at_x = x + row[:, None] * x_row + inner[None, :]
    at_weight = weight + column.to(tl.int64)[None, :] * weight_row + inner[:, None]
    for start in range(0, k, BLOCK_K):
        left = tl.load(at_x + start, mask=there[:, None] & (inner < k - start)[None, :], other=0.0)
        right = tl.load(at_weight + start, mask=(column < n)[None, :] & (inner < k - start)[:, None], other=0.0)
        sums = dot(left, widen(right, x.dtype.element_ty), sums)
    if SCALED:
        sums *= tl.load(scales + column, mask=column < n, other=0.0)[None, :]
    if BIAS:
        sums += tl.load(bias + column, mask=column < n, other=0.0)[None, :]
    return sums


@triton.jit
def _gate_up(
    x, weight, scales, bias, extra, inner, out, order, starts, ends, experts, chosen, n, k, x_row, limit, alpha,
    CODE: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr, INNER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, place, there = _rows_of(tl.program_id(0), starts, ends, experts, BLOCK_M)
    if tl.sum(there.to(tl.int32), 0) > 0:
        choice = tl.load(order + place, mask=there, other=0).to(tl.int64)
        row = choice // chosen
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = there[:, None] & (column < n)[None, :]
        matrix = expert.to(tl.int64) * 2
        gate = _multiply(
            x, row, there, weight + matrix * n * k, scales + matrix * n, bias + matrix * n, column, n, k, x_row, k,
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), SCALED, BIAS, BLOCK_K,
        )  # fmt: skip
        matrix += 1
        up = _multiply(
            x, row, there, weight + matrix * n * k, scales + matrix * n, bias + matrix * n, column, n, k, x_row, k,
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), SCALED, BIAS, BLOCK_K,
        )  # fmt: skip
        if EXTRA:
            at_extra = extra + choice[:, None] * 2 * n + column[None, :]
            gate += tl.load(at_extra, mask=mask, other=0.0).to(tl.float32)
            up += tl.load(at_extra + n, mask=mask, other=0.0).to(tl.float32)
        if CODE == 6:  # gpt-oss
            gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
            result = gate * tl.sigmoid(alpha * gate) * (up + 1.0)
        else:
            result = apply(gate, CODE) * up
        if INNER:
            tl.store(inner + choice[:, None] * n + column[None, :], result.to(inner.dtype.element_ty), mask=mask)
        tl.store(out + place.to(tl.int64)[:, None] * n + column[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _down(
    x, weight, scales, bias, shares, out, order, starts, ends, experts, n, k, SCALED: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, place, there = _rows_of(tl.program_id(0), starts, ends, experts, BLOCK_M)
    if tl.sum(there.to(tl.int32), 0) > 0:
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        matrix = expert.to(tl.int64)
        result = _multiply(
            x, place.to(tl.int64), there, weight + matrix * n * k, scales + matrix * n, bias + matrix * n, column, n,
            k, k, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), SCALED, BIAS, BLOCK_K,
        )  # fmt: skip
        choice = tl.load(order + place, mask=there, other=0).to(tl.int64)
        result *= tl.load(shares + choice, mask=there, other=0.0)[:, None]
        mask = there[:, None] & (column < n)[None, :]
        tl.store(out + choice[:, None] * n + column[None, :], result, mask=mask)


@triton.jit
def _add(
    rows, ids, residual, out, experts, chosen, n, residual_row, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if RESIDUAL:
        total = tl.load(residual + token * residual_row + column, mask=column < n, other=0.0).to(tl.float32)
    for i in range(0, chosen):
        expert = tl.load(ids + token * chosen + i)
        here = (expert >= 0) & (expert < experts)
        total += tl.load(rows + (token * chosen + i) * n + column, mask=(column < n) & here, other=0.0)
    tl.store(out + token * n + column, total.to(out.dtype.element_ty), mask=column < n)


def route(ids: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """`order`, `starts` and `ends` of the legend, for tiles of so many rows; a choice of -1 comes nowhere."""
    flat = ids.reshape(-1)
    if flat.numel() <= FEW:
        order, starts, ends = (
            torch.empty(size, dtype=torch.int32, device=ids.device) for size in (flat.numel(), experts + 1, experts)
        )
        wide = triton.next_power_of_2(experts)
        block = max(16, min(triton.next_power_of_2(flat.numel()), 8192 // wide))
        _route[(1,)](flat, order, starts, ends, flat.numel(), experts, ROWS=rows, BLOCK=block, EXPERTS=wide)
        return order, starts, ends
    found, order = torch.where(flat < 0, experts, flat).sort(stable=True)
    starts = torch.searchsorted(found, torch.arange(experts + 1, device=ids.device))
    ends = ((starts.diff() + rows - 1) // rows).cumsum(0)
    return order.int(), starts.int(), ends.int()


def experts(
    x: Tensor, ids: Tensor, shares: Tensor, gate_up: tuple[Tensor, Tensor | None, Tensor | None],
    down: tuple[Tensor, Tensor | None, Tensor | None], code: int, limit: float, alpha: float, residual: Tensor | None,
    extra: Tensor | None = None, inner: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `modelport.kernels.moe.experts`; of both products: weights, scales and bias. `code` 6 is `SwigluOAI`.

    extra, inner: dense.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (tokens, hidden), chosen = x.shape, ids.shape[1]
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    ids, shares, choices = ids.contiguous(), shares.contiguous(), tokens * chosen
    (weight, scales, bias), count, width = gate_up, gate_up[0].shape[0], gate_up[0].shape[2]
    each = choices // count  # rows of an expert, when they are spread evenly
    block_m, block_n, block_k, warps, stages = tiles(max(1, 2 * each), x.dtype == torch.float32)
    block_n = min(block_n, 64)  # there are two sums
    order, starts, ends = route(ids, count, block_m)
    most = min(choices, choices // block_m + count)
    between = torch.empty((choices, width), dtype=x.dtype, device=x.device)
    _gate_up[(most, triton.cdiv(width, block_n))](
        x, weight, x if scales is None else scales, x if bias is None else bias, x if extra is None else extra,
        x if inner is None else inner, between, order, starts, ends, count, chosen, width, hidden, x.stride(0), limit,
        alpha, CODE=code, SCALED=scales is not None, BIAS=bias is not None, EXTRA=extra is not None,
        INNER=inner is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    weight, scales, bias = down
    rows = torch.empty((choices, hidden), dtype=torch.float32, device=x.device)
    _down[(most, triton.cdiv(hidden, block_n))](
        between, weight, x if scales is None else scales, x if bias is None else bias, shares, rows, order, starts,
        ends, count, hidden, width, SCALED=scales is not None, BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _add[(tokens, triton.cdiv(hidden, 1024))](
        rows, ids, x if residual is None else residual, out, count, chosen, hidden,
        0 if residual is None else residual.stride(0), RESIDUAL=residual is not None, BLOCK=1024,
    )  # fmt: skip
    return out
