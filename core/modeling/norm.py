"""Normalisation layers; both compute in float32 and return the dtype of their input."""

import torch
from torch import Tensor, nn

from modelport.kernels import norm as kernel


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` (Zhang and Sennrich, 2019); `offset=1` for weights around 0."""

    def __init__(self, size: int, eps: float = 1e-6, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernel.rms_norm(x, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) * weight + bias` (Ba et al., 2016)."""

    def __init__(self, size: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return kernel.layer_norm(x, self.weight, self.bias, self.eps)
