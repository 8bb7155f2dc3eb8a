"""State-space operations: a program keeps the states of some channels of one sequence in registers and goes through its
rows, so that a prompt in pieces gives the same bits as a whole one and a decode step is one pass over the state.

Legend: s: a program's sequence, `first` to `last` its rows; channel: a tile of channels; slot: row of the states.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # of the convolution at a time


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to the last digits: what rounding 1 + e takes away, the quotient gives back (Kahan)."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    exact = tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.where(x > 20.0, x, exact)


@triton.jit
def _convolve(
    x, weight, bias, state, out, positions, starts, slots, channels, x_row, TAPS: tl.constexpr, BIAS: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = channel < channels
    first, last = tl.load(starts + s), tl.load(starts + s + 1)
    if last > first:
        fresh = tl.load(positions + first) == 0
        mine = state + tl.load(slots + s).to(tl.int64) * (TAPS - 1) * channels + channel[None, :]
        for begin in range(first, last, ROWS):
            row = begin + tl.arange(0, ROWS)
            sums = tl.zeros((ROWS, BLOCK), tl.float32)
            if BIAS:
                sums += tl.load(bias + channel, mask=there, other=0.0)[None, :]
            for tap in tl.static_range(TAPS):
                source = row - (TAPS - 1) + tap
                of_step = (source >= first) & (row < last)
                place = x + source.to(tl.int64)[:, None] * x_row + channel[None, :]
                value = tl.load(place, mask=of_step[:, None] & there[None, :], other=0.0).to(tl.float32)
                if TAPS > 1:
                    kept = source - first + TAPS - 1  # in the state, when it lies before this step
                    known = (source < first) & (row < last) & (fresh == 0)
                    place = mine + kept[:, None] * channels
                    value += tl.load(place, mask=known[:, None] & there[None, :], other=0.0).to(tl.float32)
                sums += value * tl.load(weight + tap * channels + channel, mask=there, other=0.0)[None, :]
            if SILU:
                sums *= tl.sigmoid(sums)
            place = out + row.to(tl.int64)[:, None] * channels + channel[None, :]
            tl.store(place, sums.to(out.dtype.element_ty), mask=(row < last)[:, None] & there[None, :])
        if TAPS > 1:
            kept = tl.arange(0, KEPT)
            source = last - (TAPS - 1) + kept
            of_step = (kept < TAPS - 1) & (source >= first)
            place = x + source.to(tl.int64)[:, None] * x_row + channel[None, :]
            value = tl.load(place, mask=of_step[:, None] & there[None, :], other=0.0)
            known = (kept < TAPS - 1) & (source < first) & (fresh == 0)
            place = mine + (source - first + TAPS - 1)[:, None] * channels
            old = tl.load(place, mask=known[:, None] & there[None, :], other=0.0)
            value = tl.where(of_step[:, None], value, old)
            tl.debug_barrier()  # all of the program have read the old state
            tl.store(mine + kept[:, None] * channels, value, mask=(kept < TAPS - 1)[:, None] & there[None, :])


@triton.jit
def _scan(
    x, dt, rates, b, c, skip, gate, dt_bias, state, out, positions, starts, slots, channels, states, x_row, dt_row,
    b_row, c_row, gate_row, GATE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    channel, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    there = channel < channels
    both = (n < states)[:, None] & there[None, :]
    first, last = tl.load(starts + s), tl.load(starts + s + 1)
    if last > first:
        fresh = tl.load(positions + first) == 0
        mine = state + (tl.load(slots + s).to(tl.int64) * states + n)[:, None] * channels + channel[None, :]
        h = tl.load(mine, mask=both & (fresh == 0), other=0.0)
        rate = tl.load(rates + n[:, None] * channels + channel[None, :], mask=both, other=0.0)
        shift = tl.load(dt_bias + channel, mask=there, other=0.0)
        through = tl.load(skip + channel, mask=there, other=0.0)
        row = first.to(tl.int64)
        for _ in range(first, last):
            wide = tl.load(x + row * x_row + channel, mask=there, other=0.0).to(tl.float32)
            step = _softplus(tl.load(dt + row * dt_row + channel, mask=there, other=0.0).to(tl.float32) + shift)
            into = tl.load(b + row * b_row + n, mask=n < states, other=0.0).to(tl.float32)
            read = tl.load(c + row * c_row + n, mask=n < states, other=0.0).to(tl.float32)
            h = h * tl.exp(step[None, :] * rate) + into[:, None] * (step * wide)[None, :]
            y = tl.sum(h * read[:, None], 0) + through * wide
            if GATE:
                z = tl.load(gate + row * gate_row + channel, mask=there, other=0.0).to(tl.float32)
                y *= z * tl.sigmoid(z)
            tl.store(out + row * channels + channel, y.to(out.dtype.element_ty), mask=there)
            row += 1
        tl.store(mine, h, mask=both)


@triton.jit
def _head_scan(
    x, dt, rates, b, c, skip, dt_bias, state, out, positions, starts, slots, heads, head_dim, states, repeats, low,
    high, x_row, x_head, dt_row, b_row, b_group, c_row, c_group, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s, head = tl.program_id(0), tl.program_id(1)
    channel, n = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    there = channel < head_dim
    both = (n < states)[:, None] & there[None, :]
    first, last = tl.load(starts + s), tl.load(starts + s + 1)
    if last > first:
        fresh = tl.load(positions + first) == 0
        at = (tl.load(slots + s).to(tl.int64) * heads + head) * states
        mine = state + (at + n)[:, None] * head_dim + channel[None, :]
        h = tl.load(mine, mask=both & (fresh == 0), other=0.0)
        rate, shift, through = tl.load(rates + head), tl.load(dt_bias + head), tl.load(skip + head)
        group = head // repeats
        row = first.to(tl.int64)
        for _ in range(first, last):
            wide = tl.load(x + row * x_row + head * x_head + channel, mask=there, other=0.0).to(tl.float32)
            step = _softplus(tl.load(dt + row * dt_row + head).to(tl.float32) + shift)
            step = tl.minimum(tl.maximum(step, low), high)
            into = tl.load(b + row * b_row + group * b_group + n, mask=n < states, other=0.0).to(tl.float32)
            read = tl.load(c + row * c_row + group * c_group + n, mask=n < states, other=0.0).to(tl.float32)
            h = h * tl.exp(step * rate) + into[:, None] * (step * wide)[None, :]
            y = tl.sum(h * read[:, None], 0) + through * wide
            tl.store(out + (row * heads + head) * head_dim + channel, y.to(out.dtype.element_ty), mask=there)
            row += 1
        tl.store(mine, h, mask=both)


@triton.jit
def _gated_norm(
    x, gate, weight, out, width, size, x_row, gate_row, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * size + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < size
    z = tl.load(gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    wide = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32) * z * tl.sigmoid(z)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    normed *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, normed.to(out.dtype.element_ty), mask=mask)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, positions: Tensor, starts: Tensor, slots: Tensor,
    silu: bool,
) -> Tensor:  # fmt: skip
    """As `modelport.kernels.ssm.causal_conv`."""
    x, (taps, channels), seqs = _dense(x), weight.shape, slots.shape[0]
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if seqs and channels:
        _convolve[(seqs, triton.cdiv(channels, 64))](
            x, weight, weight if bias is None else bias, state, out, positions, starts, slots, channels, x.stride(0),
            TAPS=taps, BIAS=bias is not None, SILU=silu, ROWS=ROWS if x.shape[0] > seqs else 1,
            KEPT=triton.next_power_of_2(max(taps - 1, 1)), BLOCK=64, num_warps=2,
        )  # fmt: skip
    return out


def selective_scan(
    x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor, skip: Tensor, gate: Tensor | None, dt_bias: Tensor,
    state: Tensor, positions: Tensor, starts: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """As `modelport.kernels.ssm.selective_scan`."""
    x, dt, b, c = _dense(x), _dense(dt), _dense(b), _dense(c)
    gate = None if gate is None else _dense(gate)
    (states, channels), seqs = rates.shape, slots.shape[0]
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if seqs and channels:
        _scan[(seqs, triton.cdiv(channels, 64))](
            x, dt, rates, b, c, skip, x if gate is None else gate, dt_bias, state, out, positions, starts, slots,
            channels, states, x.stride(0), dt.stride(0), b.stride(0), c.stride(0),
            0 if gate is None else gate.stride(0), GATE=gate is not None, STATES=triton.next_power_of_2(states),
            BLOCK=64, num_warps=2,
        )  # fmt: skip
    return out


def head_scan(
    x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor, skip: Tensor, dt_bias: Tensor,
    dt_limits: tuple[float, float], state: Tensor, positions: Tensor, starts: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """As `modelport.kernels.ssm.head_scan`."""
    x, dt, b, c = _dense(x), _dense(dt), _dense(b), _dense(c)
    (_, heads, head_dim), states, seqs = x.shape, b.shape[2], slots.shape[0]
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if seqs and head_dim:
        _head_scan[(seqs, heads, triton.cdiv(head_dim, 32))](
            x, dt, rates, b, c, skip, dt_bias, state, out, positions, starts, slots, heads, head_dim, states,
            heads // b.shape[1], *dt_limits, x.stride(0), x.stride(1), dt.stride(0), b.stride(0), b.stride(1),
            c.stride(0), c.stride(1), STATES=triton.next_power_of_2(states), BLOCK=32, num_warps=4,
        )  # fmt: skip
    return out


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """As `modelport.kernels.ssm.gated_norm`, x: (tokens, width)."""
    x, gate = _dense(x), _dense(gate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(group_size)
        _gated_norm[(x.shape[0], x.shape[1] // group_size)](
            x, gate, weight.contiguous(), out, x.shape[1], group_size, x.stride(0), gate.stride(0), eps, BLOCK=block,
            num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
    return out
