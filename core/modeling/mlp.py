"""The feed-forward block of most decoders."""

from torch import Tensor, nn

from modelport.modeling.activation import Gated
from modelport.modeling.linear import MergedLinear, RowLinear


class GatedMLP(nn.Module):
    """`down_proj(act(gate_proj(x)) * up_proj(x)) + residual` (Shazeer, 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: str, bias: bool = False):
        super().__init__()
        sizes = (intermediate_size, intermediate_size)
        self.gate_up_proj = MergedLinear(hidden_size, sizes, ("gate_proj", "up_proj"), bias)
        self.act = Gated(act)
        self.down_proj = RowLinear(intermediate_size, hidden_size, bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.down_proj(self.act(self.gate_up_proj(x)), residual)
