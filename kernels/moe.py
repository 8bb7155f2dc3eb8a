"""The experts of a mixture of experts as one operation: a grouped matrix product over weights packed once at load.

Every expert is a gated feed-forward layer, `down(act(gate(x)) * up(x))`; a token's result is the sum over its chosen
experts, each times its share. Decisions: weights are stacked, expert first, so that experts can later lie on several
devices; within an expert every matrix is packed as linear.py packs it, gate and up each by itself. The compiled kernel
sorts the choices by expert and reads each used expert once; it sums in float32 and rounds once at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modelport.kernels import activation, cpu, gpu, linear
from modelport.kernels.linear import PackedWeight

_SWIGLU_OAI = 6  # in the C library, after the codes of activation.py


@dataclass(frozen=True)
class SwigluOAI:
    """gpt-oss's activation: `gate * sigmoid(alpha * gate) * (up + 1)`, gate at most `limit`, up within +-`limit`."""

    limit: float = 7.0
    alpha: float = 1.702


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """Weights (experts, parts, out_features, in_features) as `experts` wants them; make it with `pack`."""

    data: Tensor  # (experts, parts, *blocked layout), or unchanged when not blocked
    out_features: int  # of one part
    in_features: int
    blocked: bool
    scales: Tensor | None = None  # (experts, parts, out_features) float32, for int8
    bias: Tensor | None = None  # (experts, parts, out_features) float32

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scales, self.bias) if t is not None)

    def matrix(self, expert: int, part: int = 0) -> PackedWeight:
        """One matrix (out_features, in_features), without its bias; a view."""
        scales = None if self.scales is None else self.scales[expert, part]
        return PackedWeight(self.data[expert, part], self.out_features, self.in_features, self.blocked, scales)


def pack(
    weight: Tensor, bias: Tensor | None = None, packer: Callable[[Tensor], PackedWeight] = linear.pack
) -> PackedExperts:
    """Pack every matrix of weight: (experts, parts, out, in) with `packer`; bias: (experts, parts, out).

    `weight` is used up: where the packed form is as large, it takes the memory over, so that a layer's experts never
    lie in memory twice.
    """
    if weight.dim() != 4 or not weight.numel():
        raise ValueError(f"pack: want weights (experts, parts, out, in), got {tuple(weight.shape)}")
    weight, bias = weight.detach(), None if bias is None else bias.detach().float()
    first, data, scales = packer(weight[0, 0]), None, []
    if first.dtype == weight.dtype and first.data.nbytes == weight[0, 0].nbytes and weight.is_contiguous():
        data = weight.view(*weight.shape[:2], *first.data.shape)
    else:
        data = torch.empty((*weight.shape[:2], *first.data.shape), dtype=first.dtype, device=weight.device)
    for expert in range(weight.shape[0]):
        for part in range(weight.shape[1]):
            packed = packer(weight[expert, part])
            data[expert, part] = packed.data
            scales.append(packed.scales)
    kept = None if first.scales is None else torch.stack(scales).view(*weight.shape[:3])
    return PackedExperts(data, first.out_features, first.in_features, first.blocked, kept, bias)


def experts_reference(
    x: Tensor,
    ids: Tensor,
    shares: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    act: str | SwigluOAI,
    residual: Tensor | None = None,
    extra: Tensor | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    """Plain torch version of `experts`."""
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if residual is None else residual.float()
    for expert in range(gate_up.data.shape[0]):
        token, slot = torch.where(ids == expert)
        if token.numel():
            gate, up = (_matrix(x[token], gate_up, expert, part) for part in (0, 1))
            if extra is not None:
                gate, up = gate + extra[token, slot, 0], up + extra[token, slot, 1]
            made = _gated(gate, up, act)
            if inner is not None:
                inner[token, slot] = made
            rows = _matrix(made, down, expert, 0)
            total = total.index_add(0, token, rows.float() * shares[token, slot, None])
    return total.to(x.dtype)


def _matrix(x: Tensor, packed: PackedExperts, expert: int, part: int) -> Tensor:
    out = linear.linear_reference(x, packed.matrix(expert, part))
    return out if packed.bias is None else (out.float() + packed.bias[expert, part]).to(x.dtype)


def _gated(gate: Tensor, up: Tensor, act: str | SwigluOAI) -> Tensor:
    if isinstance(act, str):
        return activation.gated_reference(torch.cat((gate, up), dim=-1), act)
    gate, up, dtype = gate.float().clamp(max=act.limit), up.float().clamp(-act.limit, act.limit), gate.dtype
    return (gate * torch.sigmoid(act.alpha * gate) * (up + 1.0)).to(dtype)


def experts(
    x: Tensor,
    ids: Tensor,
    shares: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    act: str | SwigluOAI,
    residual: Tensor | None = None,
    extra: Tensor | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    """residual + sum over a token's choices of share * expert(x) -> (tokens, hidden), in x.dtype.

    x: (tokens, hidden) in the weights' dtype (any float for int8); ids: (tokens, chosen) int64, -1 for a choice that
    lies on another device and adds nothing; shares: (tokens, chosen) float32; gate_up: two parts (width, hidden);
    down: one part (hidden, width); residual: (tokens, hidden).

    What adapters of the experts need: extra: (tokens, chosen, 2, width), added to gate and up before the activation;
    inner: (tokens, chosen, width), filled with what goes into the down product where a choice is one.
    """
    if isinstance(act, str):
        code, limit, alpha = activation.kind(act)[0], 0.0, 0.0
    else:
        code, limit, alpha = _SWIGLU_OAI, act.limit, act.alpha
    on_gpu = gpu.takes(x) and not gate_up.blocked and not down.blocked
    if not on_gpu and cpu.lib is not None and gate_up.blocked and down.blocked:
        out = torch.empty(x.shape, dtype=x.dtype)
        if cpu.lib.experts(
            x, ids, shares, gate_up.data, gate_up.scales, gate_up.bias, down.data, down.scales, down.bias, residual,
            extra, inner, out, gate_up.out_features, code, limit, alpha, cpu.threads(),
        ):  # fmt: skip
            return out
    _check(x, ids, shares, gate_up, down, residual)
    if extra is not None or inner is not None:
        _check_adapted(ids, gate_up.out_features, extra, inner)
    if on_gpu:
        of_both = ((packed.data, packed.scales, packed.bias) for packed in (gate_up, down))
        extra = None if extra is None else extra.contiguous()
        return gpu.moe.experts(x, ids, shares, *of_both, code, limit, alpha, residual, extra, inner)
    return experts_reference(x, ids, shares, gate_up, down, act, residual, extra, inner)


def _check_adapted(ids: Tensor, width: int, extra: Tensor | None, inner: Tensor | None) -> None:
    if extra is not None and extra.shape != (*ids.shape, 2, width):
        raise ValueError(f"experts: extra {tuple(extra.shape)} must be {(*ids.shape, 2, width)}")
    if inner is not None and (inner.shape != (*ids.shape, width) or not inner.is_contiguous()):
        raise ValueError(f"experts: inner {tuple(inner.shape)} must be {(*ids.shape, width)}, dense")


def _check(
    x: Tensor, ids: Tensor, shares: Tensor, gate_up: PackedExperts, down: PackedExperts, residual: Tensor | None
) -> None:
    count, hidden = gate_up.data.shape[0], gate_up.in_features
    if x.dim() != 2 or x.shape[1] != hidden:
        raise ValueError(f"experts: x {tuple(x.shape)} must be (tokens, {hidden})")
    if gate_up.scales is None and x.dtype != gate_up.dtype:
        raise ValueError(f"experts: x is {x.dtype}, the packed weights {gate_up.dtype}; convert x")
    if gate_up.data.shape[1] != 2 or (down.out_features, down.in_features) != (hidden, gate_up.out_features):
        raise ValueError(
            f"experts: gate_up has {gate_up.data.shape[1]} parts {gate_up.out_features, hidden}, "
            f"down {down.out_features, down.in_features} does not fit"
        )
    if ids.shape != shares.shape or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"experts: ids {tuple(ids.shape)} and shares {tuple(shares.shape)} must be ({x.shape[0]}, k)")
    if ids.dtype != torch.int64 or shares.dtype != torch.float32:
        raise ValueError(f"experts: ids must be int64 and shares float32, got {ids.dtype} and {shares.dtype}")
    if ids.is_cpu and ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(f"experts: ids reach from {int(ids.min())} to {int(ids.max())}, there are {count} experts")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"experts: residual {tuple(residual.shape)} must be {tuple(x.shape)}")
