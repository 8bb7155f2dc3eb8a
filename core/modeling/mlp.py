"""The feed-forward blocks of most decoders."""

from torch import Tensor, nn

from modelport.modeling.activation import Activation, Gated
from modelport.modeling.linear import ColumnLinear, MergedLinear, RowLinear


class GatedMLP(nn.Module):
    """`down_proj(act(gate_proj(x)) * up_proj(x)) + residual` (Shazeer, 2020).

    :param names: of gate, up and down in the checkpoint.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        act: str,
        bias: bool = False,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ):
        super().__init__()
        sizes = (intermediate_size, intermediate_size)
        self.gate_up_proj = MergedLinear(hidden_size, sizes, names[:2], bias)
        self.act = Gated(act)
        self.down = names[2]
        self.add_module(self.down, RowLinear(intermediate_size, hidden_size, bias))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return getattr(self, self.down)(self.act(self.gate_up_proj(x)), residual)


class MLP(nn.Module):
    """`down(act(up(x))) + residual`: the plain form.

    :param names: the checkpoint's names of the two layers, such as ("fc1", "fc2") or ("c_fc", "c_proj").
    :param out_size: width of the result, where it is another one, as in a projector; there is no residual then.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        act: str,
        bias: bool = False,
        names: tuple[str, str] = ("up_proj", "down_proj"),
        out_size: int | None = None,
    ):
        super().__init__()
        self.names = names
        self.add_module(names[0], ColumnLinear(hidden_size, intermediate_size, bias))
        self.act = Activation(act)
        self.add_module(names[1], RowLinear(intermediate_size, hidden_size if out_size is None else out_size, bias))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        up, down = self.names
        return getattr(self, down)(self.act(getattr(self, up)(x)), residual)
