"""Low-rank updates of a linear layer's result, each row with its own adapter.

LoRA is of Hu et al., 2021, the grouping of Chen et al., 2023 (Punica).

Decisions: adapters lie stacked in slots, and a row names the slot that is its own, so that rows of many adapters and of
none are one call without sorting in Python; what is added is summed in float32 and rounded once, into the result.
Parts of a fused layer have an A each, which lie one behind another; a B lies as (rank, out), so that its rows are read
as they come.

Legend: rows = rows of the layer's input; slots = places for adapters; parts = of a fused layer; rank = room for ranks.
"""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelport.kernels import cpu, gpu


@dataclass(eq=False)
class LowRank:
    """The adapters of one layer.

    :ivar a: (slots, parts * rank, in).
    :ivar b: (slots, rank, out), with the adapters' scale in it.
    :ivar ranks: (slots,) int32, how much of `rank` each slot uses; 0 where its adapter leaves the layer alone. The rest
        of its `a` and `b` are zeros.
    :ivar edges: (parts + 1,) first output of each part; the last is the number of outputs.
    """

    a: Tensor
    b: Tensor
    ranks: Tensor
    edges: tuple[int, ...]
    starts: Tensor = field(init=False)  # the same as a tensor

    def __post_init__(self) -> None:
        parts, (slots, rank, out) = len(self.edges) - 1, self.b.shape
        if self.a.shape[:2] != (slots, parts * rank) or self.edges[-1] != out or self.ranks.shape != (slots,):
            raise ValueError(
                f"low-rank matrices {tuple(self.a.shape)} and {tuple(self.b.shape)} do not fit {parts} parts that end "
                f"at {self.edges[-1]}, and {tuple(self.ranks.shape)} ranks"
            )
        self.starts = torch.tensor(self.edges, dtype=torch.int32)


def lora_reference_(out: Tensor, x: Tensor, slots: Tensor, low_rank: LowRank) -> None:
    """Plain torch version of `lora_`."""
    rank = low_rank.b.shape[1]
    for slot in slots.unique().tolist():
        if slot < 0 or not low_rank.ranks[slot]:
            continue
        rows = (slots == slot).nonzero()[:, 0]
        low = x[rows].float() @ low_rank.a[slot].float().T  # (rows of the slot, parts * rank)
        added = [
            low[:, part * rank : (part + 1) * rank] @ low_rank.b[slot, :, start:end].float()
            for part, (start, end) in enumerate(itertools.pairwise(low_rank.edges))
        ]
        out[rows] = (out[rows].float() + torch.cat(added, 1)).to(out.dtype)


def lora_(out: Tensor, x: Tensor, slots: Tensor, low_rank: LowRank) -> None:
    """`out += x @ a[slot].T @ b[slot]` in place, for every row the slot that is its own.

    out: (rows, out), x: (rows, in), both in the matrices' dtype; slots: (rows,) int32, -1 for none.

    :raises ValueError: shapes or dtypes that do not fit, or a slot that there is not.
    """
    if cpu.lib is not None and cpu.lib.lora(
        x, slots, low_rank.a, low_rank.b, low_rank.ranks, low_rank.starts, out, cpu.threads()
    ):
        return
    a, b = low_rank.a, low_rank.b
    if x.dim() != 2 or out.shape != (len(x), b.shape[2]) or x.shape[1] != a.shape[2] or slots.shape != (len(x),):
        raise ValueError(
            f"lora: x {tuple(x.shape)}, out {tuple(out.shape)} and slots {tuple(slots.shape)} must be "
            f"(rows, {a.shape[2]}), (rows, {b.shape[2]}) and (rows,)"
        )
    if not x.dtype == out.dtype == a.dtype == b.dtype or slots.dtype != torch.int32:
        raise ValueError(f"lora: x is {x.dtype}, out {out.dtype}, slots {slots.dtype}, the adapters {a.dtype}; convert")
    if slots.is_cpu and len(slots) and not -1 <= int(slots.min()) <= int(slots.max()) < len(b):
        raise ValueError(f"lora: slots reach from {int(slots.min())} to {int(slots.max())}, there are {len(b)}")
    if not gpu.takes(x):
        return lora_reference_(out, x, slots, low_rank)
    rank = b.shape[1]
    for part, (start, end) in enumerate(itertools.pairwise(low_rank.edges)):
        some = out[:, start:end]
        some.copy_(gpu.lora.lora(x, slots, a[:, part * rank : (part + 1) * rank], b[:, :, start:end], some))
