"""A mixture of experts: a router that gives each token a few experts and their shares, and the experts as one layer.

Decisions: a family writes `self.experts(x, *self.gate(x))` and adds its shared experts itself; the router's settings
say what published routers do, only sparsemixer is a class of its own. The softmax of the chosen logits alone (Mixtral,
GraniteMoe, gpt-oss) is the softmax of all of them with `normalize=1`. Experts are stacked in one parameter whose
`parts` are their names in checkpoints, expert by expert; the whole is taken too, as transformers 5 calls it.

x: (tokens, hidden); shares: (tokens, top_k) float32; ids: (tokens, top_k) int64.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from modelport.kernels import linear as linear_kernel
from modelport.kernels import moe as kernel
from modelport.kernels.activation import ACTIVATIONS
from modelport.kernels.moe import SwigluOAI as SwigluOAI
from modelport.modeling.linear import Update


class Router(nn.Module):
    """Chooses `top_k` of `num_experts` for every token, weight: (num_experts, hidden_size); -> shares, ids.

    :param scores: what turns logits into scores, computed in float32.
    :param normalize: divide the chosen scores by their p-norm, 1 for their sum; None leaves them.
    :param scale: factor on the shares (`routed_scaling_factor`), after normalisation.
    :param bias: logits have a bias.
    :param correction: the checkpoint has `e_score_correction_bias`, added to scores when experts are chosen, not to
        shares (DeepSeek-AI, 2024, arXiv:2412.19437, equation 16). It stays float32.
    :param groups: the experts' groups; a token's experts all lie in its `top_groups` best ones.
    :param group_best: a group is judged by the sum of so many of its best scores: 1 in DeepSeek-V2, 2 in V3.
    :param exact: compute the logits in float32, whatever the model's dtype.
    :ivar update: as `Linear.update`, of the logits.
    :raises ValueError: settings that cannot give every token `top_k` experts.
    """

    keep_float32 = ("e_score_correction_bias",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scores: Literal["softmax", "sigmoid"] = "softmax",
        normalize: float | None = None,
        scale: float = 1.0,
        bias: bool = False,
        correction: bool = False,
        groups: int = 1,
        top_groups: int = 1,
        group_best: int = 1,
        exact: bool = False,
    ):
        super().__init__()
        if scores not in ("softmax", "sigmoid"):
            raise ValueError(f"router scores {scores!r} are not known; use 'softmax' or 'sigmoid'")
        if num_experts % groups or not 0 < top_groups <= groups or group_best > num_experts // groups:
            raise ValueError(
                f"{num_experts} experts cannot be routed by the {group_best} best of each of {groups} groups, "
                f"{top_groups} of them chosen; do n_group and topk_group belong to this model?"
            )
        if not 0 < top_k <= num_experts // groups * top_groups:
            raise ValueError(
                f"cannot choose {top_k} of {num_experts} experts in {top_groups} of {groups} groups; "
                "does num_experts_per_tok belong to this model?"
            )
        self.num_experts, self.top_k, self.scores, self.normalize, self.scale = (
            num_experts, top_k, scores, normalize, scale
        )  # fmt: skip
        self.groups, self.top_groups, self.group_best, self.exact = groups, top_groups, group_best, exact
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_experts), requires_grad=False) if bias else None
        self.e_score_correction_bias = (
            nn.Parameter(torch.empty(num_experts), requires_grad=False) if correction else None
        )
        self.packed: linear_kernel.PackedWeight | None = None
        self.update: Update | None = None

    def pack(self) -> None:
        """Swap the loaded weight for its packed form; called once by the core. Quantisation leaves routers alone."""
        self.packed = linear_kernel.pack(self.weight.data.float() if self.exact else self.weight.data)
        self.weight = None
        if self.exact and self.bias is not None:
            self.bias = nn.Parameter(self.bias.data.float(), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float() if self.exact else x
        logits = linear_kernel.linear(x, self.packed, self.bias)
        return self.choose(logits if self.update is None else self.update(x, logits))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits: (tokens, num_experts) -> shares, ids."""
        logits = logits.float()
        scores = logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()
        judged = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        if self.groups > 1:
            judged = self._in_best_groups(judged)
        ids = judged.topk(self.top_k, dim=-1).indices
        shares = scores.gather(1, ids)
        if self.normalize is not None:
            # all of a token's sigmoids may be zero
            shares = shares / (torch.linalg.vector_norm(shares, self.normalize, dim=-1, keepdim=True) + 1e-20)
        return shares * self.scale, ids

    def _in_best_groups(self, judged: Tensor) -> Tensor:
        grouped = judged.unflatten(1, (self.groups, -1))  # (tokens, groups, experts of one)
        best = grouped.topk(self.group_best, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
        out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=judged.device).scatter_(1, best, False)
        return grouped.masked_fill(out[..., None], float("-inf")).flatten(1)

    def extra_repr(self) -> str:
        grouped = f", groups={self.top_groups} of {self.groups}" if self.groups > 1 else ""
        return f"top_k={self.top_k} of {self.num_experts}, {self.scores}, normalize={self.normalize}{grouped}"


class SparseMixer(Router):
    """PhiMoE's router: two experts, each with its share among those whose logits come close to it.

    What sparsemixer-2 (Liu et al., 2024, arXiv:2409.12136) leaves at inference: an expert's share is its softmax over
    the experts within `2 * jitter` of it, relative to the larger of that logit's size and the expert's logit; the first
    expert is out of the race for the second. The two shares need not sum to one.

    :param jitter: the checkpoint's `router_jitter_noise`.
    """

    def __init__(self, hidden_size: int, num_experts: int, jitter: float):
        super().__init__(hidden_size, num_experts, 2)
        self.jitter = jitter

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        shares, ids, left = [], [], logits
        for _ in range(2):
            best, chosen = left.max(dim=-1, keepdim=True)
            far = (best - logits) / logits.abs().clamp(min=best) > 2 * self.jitter
            shares.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(1, chosen))
            ids.append(chosen)
            left = left.scatter(1, chosen, float("-inf"))
        return torch.cat(shares, 1).float(), torch.cat(ids, 1)


class ExpertLinear(nn.Module):
    """One linear layer of every expert, weight: (experts, out_features, in_features), bias: (experts, out_features).

    :ivar parts: checkpoint names and rows, expert by expert: `0.gate_proj`, `0.up_proj`, `1.gate_proj`, ...
    :ivar row_dims: how many leading dimensions of the parameters count as rows.
    :ivar packer: makes the packed form of one matrix; quantisation sets another one.
    """

    row_dims = 2

    def __init__(self, num_experts: int, in_features: int, size: int, names: tuple[str, ...], bias: bool = False):
        super().__init__()
        self.parts = tuple((f"{expert}.{name}", size) for expert in range(num_experts) for name in names)
        self.names, self.size = names, size
        shape = (num_experts, size * len(names))
        self.weight = nn.Parameter(torch.empty(*shape, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(shape), requires_grad=False) if bias else None
        self.packed: kernel.PackedExperts | None = None
        self.packer = linear_kernel.pack

    def pack(self) -> None:
        """Swap the loaded parameters for their packed form; called once by the core."""
        split = (len(self.names), self.size)
        bias = None if self.bias is None else self.bias.data.unflatten(1, split)
        self.packed = kernel.pack(self.weight.data.unflatten(1, split), bias, self.packer)
        self.weight = self.bias = None

    def extra_repr(self) -> str:
        experts = len(self.parts) // len(self.names)
        return f"experts={experts}, size={self.size}, parts={'+'.join(self.names)}"


class Experts(nn.Module):
    """`residual + sum over a token's experts of share * down(act(gate(x)) * up(x))`.

    The checkpoint's tensors are `0.gate_proj.weight` and so on beneath this layer's own name, or, of all experts,
    `gate_up_proj` (experts, 2 * intermediate_size, hidden_size) with gate before up, and `down_proj`.

    :param act: the checkpoint's `hidden_act`, or `SwigluOAI`.
    :param names: of gate, up and down in the checkpoint.
    :ivar update: computes in place of this layer, called as `forward` is with the layer before all other arguments; it
        may call `compute`.
    :raises ValueError: an activation that is not known.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act: str | SwigluOAI = "silu",
        *,
        bias: bool = False,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ):
        super().__init__()
        if isinstance(act, str) and act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {act!r} is not supported; known: {', '.join(sorted(ACTIVATIONS))}")
        self.act = act
        self.update: Callable[[Experts, Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None
        self.gate_up_proj = ExpertLinear(num_experts, hidden_size, intermediate_size, names[:2], bias)
        self.down_proj = ExpertLinear(num_experts, intermediate_size, hidden_size, names[2:], bias)

    def forward(self, x: Tensor, shares: Tensor, ids: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.update is not None:
            return self.update(self, x, shares, ids, residual)
        return self.compute(x, shares, ids, residual)

    def compute(
        self,
        x: Tensor,
        shares: Tensor,
        ids: Tensor,
        residual: Tensor | None = None,
        extra: Tensor | None = None,
        inner: Tensor | None = None,
    ) -> Tensor:
        """What `forward` says; extra, inner: as `kernels.moe.experts` takes them."""
        return kernel.experts(
            x, ids, shares, self.gate_up_proj.packed, self.down_proj.packed, self.act, residual, extra, inner
        )
