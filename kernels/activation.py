"""Activation functions, alone and as the gate of a gated feed-forward layer, computed in float32."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from modelport.kernels import cpu, gpu

# canonical name -> (code in the C library, float32 function)
_KINDS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "silu": (0, F.silu),
    "gelu": (1, F.gelu),
    "gelu_tanh": (2, lambda x: F.gelu(x, approximate="tanh")),
    "quick_gelu": (3, lambda x: x * torch.sigmoid(1.702 * x)),
    "relu": (4, F.relu),
    "relu2": (5, lambda x: F.relu(x).square()),
}

ACTIVATIONS: dict[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
"""Every accepted name, mapped to the function that computes it."""


def kind(act: str) -> tuple[int, Callable[[Tensor], Tensor]]:
    """An activation's code in the C library and its float32 function."""
    try:
        return _KINDS[ACTIVATIONS[act]]
    except KeyError:
        raise ValueError(f"unknown activation {act!r}; known: {', '.join(ACTIVATIONS)}") from None


def activate_reference(x: Tensor, act: str) -> Tensor:
    """Plain torch version of `activate`."""
    return kind(act)[1](x.float()).to(x.dtype)


def gated_reference(x: Tensor, act: str) -> Tensor:
    """Plain torch version of `gated`."""
    gate, up = x.float().chunk(2, dim=-1)
    return (kind(act)[1](gate) * up).to(x.dtype)


def activate(x: Tensor, act: str) -> Tensor:
    """act(x) for x of any shape, in x.dtype."""
    code, _ = kind(act)
    if gpu.takes(x):
        return gpu.activation.activate(x, code)
    if cpu.lib is not None:
        out = torch.empty(x.shape, dtype=x.dtype)
        if cpu.lib.activate(x, out, code, cpu.threads()):
            return out
    return activate_reference(x, act)


def gated(x: Tensor, act: str) -> Tensor:
    """act(gate) * up for x: (tokens, 2 * width) = [gate | up] -> (tokens, width), in x.dtype."""
    code, _ = kind(act)
    if x.shape[-1] % 2:
        raise ValueError(f"gated: last dimension of x {tuple(x.shape)} must be even: [gate | up]")
    if gpu.takes(x):
        return gpu.activation.gated(x, code)
    if cpu.lib is not None and x.dim() == 2:
        out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype)
        if cpu.lib.gated(x, out, code, cpu.threads()):
            return out
    return gated_reference(x, act)
