import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from modelport.kernels.activation import ACTIVATIONS
from modelport.modeling import MLP, GatedMLP


def filled(mlp: nn.Module) -> nn.Module:
    for parameter in mlp.parameters():
        parameter.data.normal_()
    return mlp


@pytest.mark.parametrize("act", sorted(set(ACTIVATIONS) & set(ACT2FN)))
@pytest.mark.parametrize("bias", [False, True])
def test_plain(act: str, bias: bool) -> None:
    mlp = filled(MLP(12, 20, act, bias, names=("fc1", "fc2")))
    wide = {name: p.data.clone() for name, p in mlp.named_parameters()}
    mlp.fc1.pack()
    mlp.fc2.pack()
    x, residual = torch.randn(5, 12), torch.randn(5, 12)
    hidden = ACT2FN[act](nn.functional.linear(x, wide["fc1.weight"], wide.get("fc1.bias")))
    want = nn.functional.linear(hidden, wide["fc2.weight"], wide.get("fc2.bias"))
    torch.testing.assert_close(mlp(x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mlp(x, residual), want + residual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_gated(names: tuple[str, str, str]) -> None:
    mlp = filled(GatedMLP(12, 20, "silu", names=names))
    assert mlp.gate_up_proj.parts == ((names[0], 20), (names[1], 20))
    last = mlp.get_submodule(names[2])
    gate_up, down = mlp.gate_up_proj.weight.data.clone(), last.weight.data.clone()
    mlp.gate_up_proj.pack()
    last.pack()
    x = torch.randn(5, 12)
    gate, up = (x @ gate_up.T).chunk(2, -1)
    torch.testing.assert_close(mlp(x), (nn.functional.silu(gate) * up) @ down.T, rtol=1e-4, atol=1e-4)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="swoosh"):
        MLP(4, 8, "swoosh")
