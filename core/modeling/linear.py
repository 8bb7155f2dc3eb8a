"""Linear layers: plain, and fused ones that name their parts.

Decisions: a fused layer's `parts` are the only statement of what it holds; loading, LoRA, quantisation and sharding
read it. `residual=` adds in the product itself (no separate pass over memory). After loading the core calls `pack`
once, which swaps the weight for the form that the device's kernel reads fastest. A plugin that adds to a layer's
result, as adapters do, sets its `update`: whatever kind of layer it is, and however it is divided, that is the one
place.

x: (tokens, in_features); every result: (tokens, out_features).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modelport.kernels import linear as kernel

Update = Callable[[Tensor, Tensor], Tensor]
"""Takes a layer's input and its result, (rows, in_features) and (rows, out_features), and gives the result to go on
with; it may change the one that it was given."""


class Linear(nn.Module):
    """`x @ weight.T + bias + residual`; weight: (out_features, in_features).

    :ivar parts: names and rows of the checkpoint tensors that lie stacked in `weight`; empty when it is one tensor.
    :ivar packer: makes the packed form of the loaded weight; quantisation sets another one.
    :ivar update: adds to the result, before a sum over places that divide the layer's inputs.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, parts: tuple[tuple[str, int], ...] = ()
    ):
        super().__init__()
        self.in_features, self.out_features, self.parts = in_features, out_features, parts
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.packed: kernel.PackedWeight | None = None
        self.packer = kernel.pack
        self.update: Update | None = None

    def pack(self) -> None:
        """Swap the loaded weight for its packed form; called once by the core."""
        self.packed = self.packer(self.weight.data)
        self.weight = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = kernel.linear(x, self.packed, self.bias, residual)
        return out if self.update is None else self.update(x, out)

    def extra_repr(self) -> str:
        held = f", parts={'+'.join(name for name, _ in self.parts)}" if self.parts else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{held}"


class ColumnLinear(Linear):
    """A linear whose outputs may be divided between devices (the first of a pair)."""


class RowLinear(Linear):
    """A linear whose inputs may be divided between devices (the second of a pair)."""


class MergedLinear(Linear):
    """Several linears over one input as one: `MergedLinear(hidden, (wide, wide), ("gate_proj", "up_proj"))`."""

    def __init__(self, in_features: int, sizes: tuple[int, ...], names: tuple[str, ...], bias: bool = False):
        super().__init__(in_features, sum(sizes), bias, parts=tuple(zip(names, sizes, strict=True)))


class QKVLinear(Linear):
    """Query, key and value projections as one product.

    Its result is three views: q (tokens, num_heads, head_dim), k and v (tokens, num_kv_heads, head_dim).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
    ):
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        super().__init__(hidden_size, sum(sizes), bias, parts=tuple(zip(names, sizes, strict=True)))
        self.heads, self.head_dim = (num_heads, num_kv_heads, num_kv_heads), head_dim

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        assert residual is None
        rows = super().forward(x).view(x.shape[0], -1, self.head_dim)
        return rows.split(self.heads, dim=1)


def ungroup_qkv(tensor: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """Rows stored key head by key head, in the order that `QKVLinear` holds: all queries, all keys, all values.

    Megatron and its descendants (GPT-NeoX, Bloom, Falcon) store for each key head the queries that share it, the key
    and the value.

    :param tensor: weight (rows, in_features) or bias (rows,), rows: (num_heads + 2 * num_kv_heads) * head_dim.
    """
    groups = tensor.unflatten(0, (num_kv_heads, -1, head_dim))
    return torch.cat([part.flatten(0, 2) for part in groups.split((groups.shape[1] - 2, 1, 1), dim=1)])
