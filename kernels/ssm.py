"""State-space operations: a causal convolution, the scans of Mamba and Mamba 2, and the norm of gated values.

Sequences of a step lie side by side, and each goes on from its own row of a state tensor, which is updated in place. A
sequence whose first row has position 0 starts from zeros whatever its row holds. Channels come last in every state,
so that neighbouring lanes of a vector are neighbouring channels. States and rates are float32, activations any type.

The CPU kernels take tokens one after the other, so that a prompt in pieces gives the same bits as a whole one. The
references step through the tokens of all sequences at once: as many Python steps as the longest sequence has rows.

Legend: tokens = rows of this step; slots = rows of a state tensor; taps = kernel size of the convolution.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from modelport.kernels import cpu, gpu


class Sequences(NamedTuple):
    """Which rows belong together, and where their states lie.

    :ivar positions: (tokens,) int64, of each row in its own sequence.
    :ivar starts: (seqs + 1,) int32, first row of each sequence; the last entry is the number of rows.
    :ivar slots: (seqs,) int32, row of each sequence in state tensors.
    """

    positions: Tensor
    starts: Tensor
    slots: Tensor


def _clear(state: Tensor, at: Sequences) -> None:
    """Zeros for the sequences that start here."""
    first = at.starts[:-1].long()
    there = at.starts.diff() > 0
    fresh = at.slots[there][at.positions[first[there]] == 0].long()
    state.index_fill_(0, fresh, 0.0)


def _steps(at: Sequences) -> Iterator[tuple[Tensor, Tensor]]:
    """For t = 0, 1, ...: the t-th row of every sequence that has one, and their slots."""
    first, lens = at.starts[:-1].long(), at.starts.diff()
    for t in range(int(lens.max()) if len(lens) else 0):
        going = lens > t
        yield first[going] + t, at.slots[going].long()


def _check(name: str, rows: int, state: Tensor, shape: tuple[int, ...], at: Sequences) -> None:
    seqs = at.slots.shape[0]
    if at.positions.shape != (rows,) or at.starts.shape != (seqs + 1,):
        raise ValueError(
            f"{name}: {rows} rows and {seqs} state slots do not fit positions {tuple(at.positions.shape)} and starts "
            f"{tuple(at.starts.shape)}"
        )
    if tuple(state.shape[1:]) != shape:
        raise ValueError(f"{name}: state {tuple(state.shape)} must be (slots, {', '.join(map(str, shape))})")
    if gpu.takes(state):  # the rest would wait for the device
        return
    if int(at.starts[0]) or int(at.starts[-1]) > rows or bool((at.starts.diff() < 0).any()):
        raise ValueError(f"{name}: query_starts {at.starts.tolist()} must rise from 0 to at most {rows} rows")
    if seqs and not 0 <= int(at.slots.min()) <= int(at.slots.max()) < state.shape[0]:
        raise ValueError(f"{name}: state_slots {at.slots.tolist()} name rows outside the state of {state.shape[0]}")


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, at: Sequences, silu: bool = True
) -> Tensor:
    """Plain torch version of `causal_conv`."""
    _clear(state, at)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for rows, slots in _steps(at):
        window = torch.cat((state[slots], x[rows, None]), dim=1)  # (seqs, taps, channels)
        state[slots] = window[:, 1:]
        y = (window.float() * weight).sum(1)
        y = y if bias is None else y + bias
        out[rows] = (F.silu(y) if silu else y).to(x.dtype)
    return out


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, at: Sequences, silu: bool = True
) -> Tensor:
    """Each channel's last `taps` values, weighed: (tokens, channels) -> the same shape and type.

    :param x: (tokens, channels); rows may be strided.
    :param weight: (taps, channels) float32, the newest value's weight last; bias: (channels,) float32.
    :param state: (slots, taps - 1, channels) in x.dtype, the last values of each sequence; updated.
    :param silu: the activation that follows; without it the sums are returned.
    """
    on_gpu = gpu.takes(x)
    if not on_gpu and cpu.lib is not None:
        out = torch.empty(x.shape, dtype=x.dtype)
        if cpu.lib.causal_conv(x, weight, bias, state, *at, out, silu, cpu.threads()):
            return out
    _check("causal_conv", x.shape[0], state, (weight.shape[0] - 1, x.shape[1]), at)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"causal_conv: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if on_gpu:
        return gpu.ssm.causal_conv(x, weight, bias, state, *at, silu)
    return causal_conv_reference(x, weight, bias, state, at, silu)


def selective_scan_reference(
    x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor, skip: Tensor, gate: Tensor | None, dt_bias: Tensor,
    state: Tensor, at: Sequences,
) -> Tensor:  # fmt: skip
    """Plain torch version of `selective_scan`."""
    _clear(state, at)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for rows, slots in _steps(at):
        wide = x[rows].float()
        step = F.softplus(dt[rows].float() + dt_bias)  # (seqs, channels)
        h = state[slots] * torch.exp(step[:, None] * rates) + b[rows].float()[:, :, None] * (step * wide)[:, None]
        state[slots] = h  # (seqs, states, channels)
        y = (h * c[rows].float()[:, :, None]).sum(1) + skip * wide
        out[rows] = (y if gate is None else y * F.silu(gate[rows].float())).to(x.dtype)
    return out


def selective_scan(
    x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor, skip: Tensor, gate: Tensor | None, dt_bias: Tensor,
    state: Tensor, at: Sequences,
) -> Tensor:  # fmt: skip
    """The scan of Mamba (Gu and Dao, 2023, algorithm 2), with its gate: (tokens, channels), in x.dtype.

    Per channel, with d = softplus(dt + dt_bias): `h = exp(d * rates) * h + d * b * x; y = (c . h + skip * x) *
    silu(gate)`, one h for each of the states, all in float32.

    :param x, dt, gate: (tokens, channels), rows may be strided; gate may be None.
    :param rates: (states, channels) float32, negative: A.
    :param b, c: (tokens, states), rows may be strided.
    :param skip, dt_bias: (channels,) float32; skip is D.
    :param state: (slots, states, channels) float32; updated.
    """
    on_gpu = gpu.takes(x)
    if not on_gpu and cpu.lib is not None:
        out = torch.empty(x.shape, dtype=x.dtype)
        if cpu.lib.selective_scan(x, dt, rates, b, c, skip, gate, dt_bias, state, *at, out, cpu.threads()):
            return out
    _check("selective_scan", x.shape[0], state, (*rates.shape[:1], x.shape[1]), at)
    if dt.shape != x.shape or b.shape != c.shape or b.shape != (x.shape[0], rates.shape[0]):
        raise ValueError(f"selective_scan: x {tuple(x.shape)}, dt {tuple(dt.shape)}, b {tuple(b.shape)} and "
                         f"c {tuple(c.shape)} disagree, or do not fit {rates.shape[0]} states")  # fmt: skip
    if on_gpu:
        return gpu.ssm.selective_scan(x, dt, rates, b, c, skip, gate, dt_bias, state, *at)
    return selective_scan_reference(x, dt, rates, b, c, skip, gate, dt_bias, state, at)


def head_scan_reference(
    x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor, skip: Tensor, dt_bias: Tensor,
    dt_limits: tuple[float, float], state: Tensor, at: Sequences,
) -> Tensor:  # fmt: skip
    """Plain torch version of `head_scan`."""
    _clear(state, at)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    repeats = x.shape[1] // b.shape[1]
    for rows, slots in _steps(at):
        wide = x[rows].float()
        step = F.softplus(dt[rows].float() + dt_bias).clamp(*dt_limits)[:, :, None]  # (seqs, heads, 1)
        into, read = (part[rows].float().repeat_interleave(repeats, 1)[..., None] for part in (b, c))
        h = state[slots] * torch.exp(step * rates[:, None])[..., None] + into * (step * wide)[:, :, None]
        state[slots] = h  # (seqs, heads, states, head_dim)
        out[rows] = ((h * read).sum(2) + skip[:, None] * wide).to(x.dtype)
    return out


def head_scan(
    x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor, skip: Tensor, dt_bias: Tensor,
    dt_limits: tuple[float, float], state: Tensor, at: Sequences,
) -> Tensor:  # fmt: skip
    """The scan of Mamba 2 (Dao and Gu, 2024): (tokens, heads, head_dim), in x.dtype.

    As `selective_scan`, but with one rate and one dt per head, b and c shared by the heads of a group, and no gate.

    :param x: (tokens, heads, head_dim), dt: (tokens, heads), b, c: (tokens, groups, states); rows may be strided.
    :param rates, skip, dt_bias: (heads,) float32; rates are negative.
    :param dt_limits: least and greatest value of softplus(dt + dt_bias).
    :param state: (slots, heads, states, head_dim) float32; updated.
    """
    on_gpu = gpu.takes(x)
    if not on_gpu and cpu.lib is not None:
        out = torch.empty(x.shape, dtype=x.dtype)
        if cpu.lib.head_scan(x, dt, rates, b, c, skip, dt_bias, state, *at, out, *dt_limits, cpu.threads()):
            return out
    tokens, heads, head_dim = x.shape
    _check("head_scan", tokens, state, (heads, b.shape[2], head_dim), at)
    if dt.shape != (tokens, heads) or b.shape != c.shape or b.shape[0] != tokens or heads % b.shape[1]:
        raise ValueError(f"head_scan: x {tuple(x.shape)}, dt {tuple(dt.shape)}, b {tuple(b.shape)} and "
                         f"c {tuple(c.shape)} disagree")  # fmt: skip
    if on_gpu:
        return gpu.ssm.head_scan(x, dt, rates, b, c, skip, dt_bias, dt_limits, state, *at)
    return head_scan_reference(x, dt, rates, b, c, skip, dt_bias, dt_limits, state, at)


def gated_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """Plain torch version of `gated_norm`."""
    wide = (x.float() * F.silu(gate.float())).unflatten(-1, (-1, group_size))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.float()).to(x.dtype)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """Root-mean-square norm of x * silu(gate): (tokens, width), over `group_size` neighbours at a time, in x.dtype.

    :param weight: (width,).
    """
    on_gpu = gpu.takes(x)
    if not on_gpu and cpu.lib is not None:
        out = torch.empty(x.shape, dtype=x.dtype)
        if cpu.lib.gated_norm(x, gate, weight, out, group_size, eps, cpu.threads()):
            return out
    if x.shape != gate.shape or weight.shape != x.shape[-1:] or x.shape[-1] % group_size:
        raise ValueError(f"gated_norm: x {tuple(x.shape)}, gate {tuple(gate.shape)}, weight {tuple(weight.shape)} and "
                         f"groups of {group_size} disagree")  # fmt: skip
    if on_gpu and x.dim() == 2:
        return gpu.ssm.gated_norm(x, gate, weight, eps, group_size)
    return gated_norm_reference(x, gate, weight, eps, group_size)
