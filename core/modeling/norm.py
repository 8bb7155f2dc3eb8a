"""Normalisation layers; both compute in float32 and return the dtype of their input.

x: (..., size), normalised over its last dimension. `size` may be (heads, head_dim), for heads with weights of their own
and x: (tokens, heads, head_dim). Where the formula has no weight, or adds a number to it, the factor is a table that is
built once, so that every form costs one kernel.
"""

import torch
from torch import Tensor, nn

from modelport.kernels import norm as kernel

Size = int | tuple[int, int]


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` (Zhang and Sennrich, 2019); `offset=1` for weights around 0.

    :param weight: False for a norm without weights.
    """

    def __init__(self, size: Size, eps: float = 1e-6, offset: float = 0.0, weight: bool = True):
        super().__init__()
        self.size, self.eps, self.offset = size, eps, offset
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False) if weight else None
        self._ones: Tensor | None = None

    def build_tables(self, device: torch.device, max_len: int) -> None:
        if self.weight is None:
            self._ones = torch.ones(self.size, device=device)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._ones if self.weight is None else self.weight
        return kernel.rms_norm(x, weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) * (offset + weight) + bias` (Ba et al., 2016).

    :param bias: False for a norm without bias.
    :param weight: False for a norm without weights (OLMo).
    :param offset: what is added to the weights, rounded to their type (Nemotron's layernorm1p: 1).
    """

    def __init__(self, size: Size, eps: float = 1e-5, bias: bool = True, weight: bool = True, offset: float = 0.0):
        super().__init__()
        self.size, self.eps, self.offset = size, eps, offset
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False) if weight else None
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None
        self._factor: Tensor | None = None

    def build_tables(self, device: torch.device, max_len: int) -> None:
        if self.weight is None:
            self._factor = torch.ones(self.size, device=device, dtype=None if self.bias is None else self.bias.dtype)
        elif self.offset:
            self._factor = self.weight + self.offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self._factor is None else self._factor
        return kernel.layer_norm(x, weight, self.bias, self.eps)
