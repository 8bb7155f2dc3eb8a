"""Rotary position embedding, in place.

Angles come from a float32 table that the caller built once; products are float32 and rounded once.
"""

import torch
from torch import Tensor

from modelport.kernels import cpu, gpu


def rotate_reference(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False) -> None:
    """Plain torch version of `rotate_`."""
    rotary = cos_sin.shape[-1]
    cos, sin = cos_sin[positions][:, None, :].chunk(2, dim=-1)  # (tokens, 1, rotary / 2)
    part = x[..., :rotary].float()
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        x[..., :rotary] = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
    else:
        a, b = part.chunk(2, dim=-1)
        x[..., :rotary] = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def check_rotation(x: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Raise ValueError where shapes or dtypes do not fit each other."""
    if x.dim() != 3 or positions.shape != x.shape[:1]:
        raise ValueError(f"rotate: x {tuple(x.shape)} must be (tokens, heads, head_dim), positions "
                         f"{tuple(positions.shape)} (tokens,)")  # fmt: skip
    if cos_sin.dim() != 2 or cos_sin.shape[1] > x.shape[2] or cos_sin.shape[1] % 2:
        raise ValueError(f"rotate: cos_sin {tuple(cos_sin.shape)} must be (max_position, rotary_dim), rotary_dim even "
                         f"and at most head_dim {x.shape[2]}")  # fmt: skip


def rotate_(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False) -> None:
    """Rotate x: (tokens, heads, head_dim) in place by the angles of positions: (tokens,) int64.

    cos_sin: (max_position, rotary_dim) float32 = [cos | sin], each rotary_dim / 2 wide; dimensions past it stay.
    Pairs are (i, i + rotary_dim / 2), or neighbours when interleaved. x may be a strided view of a fused projection.
    """
    if not gpu.takes(x) and cpu.lib is not None and cpu.lib.rotate(x, positions, cos_sin, interleaved, cpu.threads()):
        return
    check_rotation(x, positions, cos_sin)
    if gpu.takes(x) and x.stride(-1) == 1:
        return gpu.rope.rotate_(x, positions, cos_sin, interleaved)
    rotate_reference(x, positions, cos_sin, interleaved)
