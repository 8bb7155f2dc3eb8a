"""Attention with linear biases (ALiBi, Press et al., 2022): one slope per head, computed by us."""

import torch
from torch import Tensor, nn


class Alibi(nn.Module):
    """Adds `slope * (key position - query position)` to the scores of each head.

    Slopes fall from head to head as a geometric series, `2 ** (-max_bias * (h + 1) / n)` for n heads, a power of two.
    Other counts take the series of the next lower power of two, then every second slope of the one twice as long; that
    is what Bloom, Falcon, Baichuan and MPT do, each in words of its own.

    :param max_bias: exponent of the last slope; MPT's `alibi_bias_max`.
    :param scale: factor on slopes; Falcon scales biases together with scores, so it gives 1 / sqrt(head_dim).
    :ivar heads: those whose slopes are wanted, when several places divide them; all until the core says otherwise.
    :ivar slopes: (num_heads,) float32 (or as many as `heads`), once the core has built it.
    :raises ValueError: no heads.
    """

    def __init__(self, num_heads: int, max_bias: float = 8.0, scale: float = 1.0):
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"ALiBi needs at least one head, got num_heads={num_heads}; check config.json")
        self.num_heads, self.max_bias, self.scale = num_heads, max_bias, scale
        self.heads = slice(None)
        self.slopes: Tensor | None = None

    def build_tables(self, device: torch.device, max_len: int) -> None:
        """Compute `slopes`. Called once by the core."""
        whole = 1 << (self.num_heads.bit_length() - 1)  # largest power of two that is not larger
        steps = [(i + 1) / whole for i in range(whole)]
        steps += [(i + 0.5) / whole for i in range(self.num_heads - whole)]
        slopes = [self.scale * 2.0 ** (-self.max_bias * step) for step in steps]
        self.slopes = torch.tensor(slopes[self.heads], device=device)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, max_bias={self.max_bias}, scale={self.scale}"
