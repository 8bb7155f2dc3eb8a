"""Layer normalisations over the last dimension, computed in float32.

One kernel call instead of the four to six that the plain torch expression costs; the references are that expression.
"""

import torch
from torch import Tensor

from modelport.kernels import cpu, gpu


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Plain torch version of `rms_norm`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:  # Gemma multiplies in float32 and rounds once
        return (normed * (offset + weight.float())).to(x.dtype)
    return (normed.to(x.dtype) * weight).to(x.dtype)  # Llama rounds before the weight


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Plain torch version of `layer_norm`."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (normed if bias is None else normed + bias.float()).to(x.dtype)


def _fits(weight: Tensor, x: Tensor) -> bool:
    return weight.shape == x.shape[-1:] or (weight.dim() == 2 and weight.shape == x.shape[1:])


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root-mean-square norm of x: (..., hidden) times (offset + weight), in x.dtype.

    weight: (hidden,); or (heads, hidden) for x: (tokens, heads, hidden), which may be a view of a fused projection.

    With offset 0 the normalised value is rounded to x.dtype before the weight multiplies it, as Llama does; with an
    offset (1.0 is Gemma) everything is float32 until the end.
    """
    if gpu.takes(x) and _fits(weight, x):
        return gpu.norm.rms_norm(x, weight, eps, offset)
    if cpu.lib is not None:
        out = torch.empty(x.shape, dtype=x.dtype)
        if cpu.lib.rms_norm(x, weight, out, eps, offset, cpu.threads()):
            return out
    if not _fits(weight, x):
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    return rms_norm_reference(x, weight, eps, offset)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of x: (..., hidden) with weight and optional bias, in x.dtype; their shape as in `rms_norm`."""
    if gpu.takes(x) and _fits(weight, x) and (bias is None or bias.shape == weight.shape):
        return gpu.norm.layer_norm(x, weight, bias, eps)
    if cpu.lib is not None:
        out = torch.empty(x.shape, dtype=x.dtype)
        if cpu.lib.layer_norm(x, weight, bias, out, eps, cpu.threads()):
            return out
    if not _fits(weight, x) or (bias is not None and bias.shape != weight.shape):
        raise ValueError(f"layer_norm: weight {tuple(weight.shape)} or its bias does not fit x {tuple(x.shape)}")
    return layer_norm_reference(x, weight, bias, eps)
