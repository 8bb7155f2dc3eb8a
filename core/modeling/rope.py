"""Rotary positions (Su et al., 2021): tables of cosines and sines, computed by us, shared by equal layers."""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from modelport.config import RopeParameters


class Rope(nn.Module):
    """Settings of a rotary embedding, and its table once the core has built it.

    :param head_dim: size of a head; the first `partial_rotary_factor` of it is rotated.
    :param parameters: the checkpoint's `rope_parameters`.
    :param interleaved: pairs are neighbours (GPT-J) instead of halves (NeoX).
    :raises ValueError: a `rope_type` that is not known.
    """

    def __init__(self, head_dim: int, parameters: RopeParameters, interleaved: bool = False):
        super().__init__()
        if parameters.rope_type not in _FREQUENCIES:
            raise ValueError(
                f"rope_type {parameters.rope_type!r} in rope_parameters is not supported; "
                f"known types: {', '.join(sorted(_FREQUENCIES))}"
            )
        self.rotary_dim = int(head_dim * parameters.partial_rotary_factor)
        self.parameters, self.interleaved = parameters, interleaved
        self.cos_sin: Tensor | None = None

    def build_tables(self, device: torch.device, max_len: int) -> None:
        """Compute `cos_sin`: (max_len, rotary_dim) float32, cosines then sines. Called once by the core."""
        self.cos_sin = _table(self.rotary_dim, self.parameters, max_len, device)


@lru_cache(maxsize=16)
def _table(dim: int, parameters: RopeParameters, max_len: int, device: torch.device) -> Tensor:
    frequencies = _FREQUENCIES[parameters.rope_type](dim, parameters)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)  # (positions, dim / 2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _default(dim: int, p: RopeParameters) -> Tensor:
    return 1.0 / (p.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _linear(dim: int, p: RopeParameters) -> Tensor:
    return _default(dim, p) / p.factor


def _llama3(dim: int, p: RopeParameters) -> Tensor:
    """Slow frequencies are stretched, fast ones kept, those between blended (Llama 3.1 model card's reference code)."""
    if p.original_max_position_embeddings is None:
        raise ValueError("rope_type 'llama3' needs original_max_position_embeddings in rope_parameters")
    plain = _default(dim, p)
    turns = p.original_max_position_embeddings * plain / (2 * math.pi)  # full turns over the original context
    keep = ((turns - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor)).clamp(0, 1)
    return plain * keep + plain / p.factor * (1 - keep)


_FREQUENCIES = {"default": _default, "linear": _linear, "llama3": _llama3}
