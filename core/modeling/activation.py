"""Activations by their Hugging Face names."""

from torch import Tensor, nn

from modelport.kernels import activation as kernel


class Gated(nn.Module):
    """`act(gate) * up` on (tokens, 2 * width) = [gate | up] -> (tokens, width) (Shazeer, 2020).

    :param act: the checkpoint's `hidden_act`.
    :raises ValueError: an activation that is not known.
    """

    def __init__(self, act: str):
        super().__init__()
        self.act = _known(act)

    def forward(self, x: Tensor) -> Tensor:
        return kernel.gated(x, self.act)


class Activation(nn.Module):
    """One activation, elementwise; `act` as in `Gated`."""

    def __init__(self, act: str):
        super().__init__()
        self.act = _known(act)

    def forward(self, x: Tensor) -> Tensor:
        return kernel.activate(x, self.act)


def _known(act: str) -> str:
    if act not in kernel.ACTIVATIONS:
        raise ValueError(f"hidden_act {act!r} is not supported; known: {', '.join(sorted(kernel.ACTIVATIONS))}")
    return kernel.ACTIVATIONS[act]
