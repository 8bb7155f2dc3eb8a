"""State-space layers: Mamba and Mamba 2, with their convolution and their states.

Decisions: parameters have the names of published checkpoints (`A_log`, `D`, `conv1d.weight`, `dt_proj.bias`); what the
scan reads of them is float32 whatever the model's dtype, since rounding a rate of decay changes how long a state lasts,
and rates are computed once, when a layer is full. A layer's states are declared by a `StateSpec` and attached by the
core; a sequence that starts at position 0 starts from zeros. The scan is linear in tokens and a step does not depend
on how many came before.

Legend: tokens = rows of this step; inner = channels of the scan (`intermediate_size` in configurations).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.kernels import linear as linear_kernel
from modelport.kernels import ssm as kernel
from modelport.modeling.cache import StateSpec
from modelport.modeling.linear import ColumnLinear, RowLinear


def _sequences(batch: Batch) -> kernel.Sequences:
    return kernel.Sequences(batch.positions, batch.query_starts, batch.state_slots)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class CausalConv(nn.Module):
    """A convolution of each channel with its last `taps` values, and silu; weight: (channels, 1, taps).

    :param silu: False leaves the sums as they are.
    """

    def __init__(self, channels: int, taps: int, bias: bool = True, silu: bool = True):
        super().__init__()
        self.channels, self.taps, self.silu = channels, taps, silu
        self.weight = _empty(channels, 1, taps)
        self.bias = _empty(channels) if bias else None
        self.packed: Tensor | None = None

    @property
    def state_shape(self) -> tuple[int, int]:
        """Of one sequence's state: the values that its next rows will look back at."""
        return self.taps - 1, self.channels

    def pack(self) -> None:
        """Lay the weight out as (taps, channels) float32; called once by the core."""
        self.packed = self.weight.data[:, 0].float().t().contiguous()
        self.weight = None
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.data.float(), requires_grad=False)

    def forward(self, x: Tensor, state: Tensor, at: kernel.Sequences) -> Tensor:
        """x: (tokens, channels) -> the same; state: (slots, taps - 1, channels), updated."""
        return kernel.causal_conv(x, self.packed, self.bias, state, at, self.silu)


class StepLinear(ColumnLinear):
    """Widens dt to all channels. Its bias is not added: the scan adds it in float32, before the softplus."""

    keep_float32 = ("bias",)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = linear_kernel.linear(x, self.packed, None, residual)
        return out if self.update is None else self.update(x, out)


class MambaMixer(nn.Module):
    """The mixer of Mamba (Gu and Dao, 2023): project, convolve, scan with input-dependent dt, B and C, gate, project.

    :param inner_size: channels of the scan.
    :param state_size: states of each channel.
    :param conv_kernel: taps of the convolution.
    :param dt_rank: width of dt before it is widened to all channels.
    :param bias: of `in_proj` and `out_proj`.
    :param norm: called with a size, makes `dt_layernorm`, `b_layernorm` and `c_layernorm`; None for none.
    """

    keep_float32 = ("A_log", "D")

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        state_size: int,
        conv_kernel: int,
        dt_rank: int,
        *,
        bias: bool = False,
        conv_bias: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        self.sizes = (dt_rank, state_size, state_size)
        self.in_proj = ColumnLinear(hidden_size, 2 * inner_size, bias)
        self.conv1d = CausalConv(inner_size, conv_kernel, conv_bias)
        self.x_proj = RowLinear(inner_size, sum(self.sizes))
        self.dt_proj = StepLinear(dt_rank, inner_size, bias=True)
        self.A_log, self.D = _empty(inner_size, state_size), _empty(inner_size)
        self.out_proj = RowLinear(inner_size, hidden_size, bias)
        self.has_norms = norm is not None
        if norm is not None:
            self.dt_layernorm, self.b_layernorm, self.c_layernorm = (norm(size) for size in self.sizes)
        self.cache_spec = StateSpec((self.conv1d.state_shape, (state_size, inner_size)), (None, torch.float32))
        self.rates: Tensor | None = None
        self.conv_state: Tensor | None = None
        self.state: Tensor | None = None

    def pack(self) -> None:
        """Compute the rates of decay, (state_size, inner) float32; called once by the core."""
        self.rates = -self.A_log.data.float().exp().t().contiguous()
        self.A_log = None

    def attach(self, conv_state: Tensor, state: Tensor) -> None:
        """Take the layer's states, (slots, conv_kernel - 1, inner) and (slots, state_size, inner); by the core."""
        self.conv_state, self.state = conv_state, state

    def forward(self, x: Tensor, batch: Batch, residual: Tensor | None = None) -> Tensor:
        """x: (tokens, hidden_size) -> the same."""
        at = _sequences(batch)
        wide, gate = self.in_proj(x).chunk(2, dim=1)  # (tokens, inner) each
        wide = self.conv1d(wide, self.conv_state, at)
        dt, b, c = self.x_proj(wide).split(self.sizes, dim=1)
        if self.has_norms:
            dt, b, c = self.dt_layernorm(dt), self.b_layernorm(b), self.c_layernorm(c)
        y = kernel.selective_scan(
            wide, self.dt_proj(dt), self.rates, b, c, self.D, gate, self.dt_proj.bias, self.state, at
        )
        return self.out_proj(y, residual)


class GatedRMSNorm(nn.Module):
    """`rms_norm(x * silu(gate)) * weight`, normed over each of `groups` equal parts of a row."""

    def __init__(self, size: int, eps: float, groups: int = 1):
        super().__init__()
        self.eps, self.group_size = eps, size // groups
        self.weight = _empty(size)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return kernel.gated_norm(x, gate, self.weight, self.eps, self.group_size)


class Mamba2Mixer(nn.Module):
    """The mixer of Mamba 2 (Dao and Gu, 2024): heads with one rate of decay each, B and C shared within groups.

    :param num_heads, head_dim: their product is the number of the scan's channels.
    :param state_size: states of each channel.
    :param groups: heads of a group share B and C; the gated norm is over a group's channels.
    :param dt_limits: least and greatest dt.
    :param bias: of `in_proj` and `out_proj`.
    :raises ValueError: `num_heads` is not a multiple of `groups`.
    """

    keep_float32 = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        state_size: int,
        conv_kernel: int,
        *,
        groups: int = 1,
        eps: float = 1e-5,
        dt_limits: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
    ):
        super().__init__()
        if num_heads % groups:
            raise ValueError(f"{num_heads} Mamba heads are not a multiple of {groups} groups; check config.json")
        inner = num_heads * head_dim
        self.num_heads, self.groups, self.dt_limits = num_heads, groups, dt_limits
        self.sizes = (inner, groups * state_size, groups * state_size)  # x, B and C
        self.in_proj = ColumnLinear(hidden_size, inner + sum(self.sizes) + num_heads, bias)
        self.conv1d = CausalConv(sum(self.sizes), conv_kernel, conv_bias)
        self.dt_bias, self.A_log, self.D = _empty(num_heads), _empty(num_heads), _empty(num_heads)
        self.norm = GatedRMSNorm(inner, eps, groups)
        self.out_proj = RowLinear(inner, hidden_size, bias)
        self.cache_spec = StateSpec((self.conv1d.state_shape, (num_heads, state_size, head_dim)), (None, torch.float32))
        self.rates: Tensor | None = None
        self.conv_state: Tensor | None = None
        self.state: Tensor | None = None

    def pack(self) -> None:
        """Compute the rates of decay, (num_heads,) float32; called once by the core."""
        self.rates = -self.A_log.data.float().exp()
        self.A_log = None

    def attach(self, conv_state: Tensor, state: Tensor) -> None:
        """Take the layer's states: (slots, conv_kernel - 1, channels of the convolution) and
        (slots, num_heads, state_size, head_dim); called by the core."""
        self.conv_state, self.state = conv_state, state

    def forward(self, x: Tensor, batch: Batch, residual: Tensor | None = None) -> Tensor:
        """x: (tokens, hidden_size) -> the same."""
        at = _sequences(batch)
        inner, *_ = self.sizes
        gate, wide, dt = self.in_proj(x).split((inner, sum(self.sizes), self.num_heads), dim=1)
        wide, b, c = self.conv1d(wide, self.conv_state, at).split(self.sizes, dim=1)
        y = kernel.head_scan(
            wide.unflatten(1, (self.num_heads, -1)),
            dt,
            self.rates,
            b.unflatten(1, (self.groups, -1)),
            c.unflatten(1, (self.groups, -1)),
            self.D,
            self.dt_bias,
            self.dt_limits,
            self.state,
            at,
        )
        return self.out_proj(self.norm(y.flatten(1), gate), residual)
