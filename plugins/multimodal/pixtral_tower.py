"""Pixtral's tower: images of any size, whose patches have rotary positions in two dimensions.

Decision: the patches of all images are packed for every product; angles are computed once for a call, in float32.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from modelport.config import RopeParameters
from modelport.modeling import (
    GatedMLP,
    PatchEmbedding,
    RMSNorm,
    VisionAttention,
    VisionConfig,
    axial_angles,
    axial_frequencies,
    feature_layers,
    grid_positions,
    layer_states,
    segments,
)


class PixtralVisionConfig(VisionConfig):
    """`vision_config` of type pixtral."""

    model_type: Literal["pixtral"] = "pixtral"
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 1024
    patch_size: int = 16
    hidden_act: str = "gelu"
    rope_theta: float = 10000.0
    rope_parameters: RopeParameters | None = None

    @property
    def theta(self) -> float:
        """Base of the angles: transformers 5 writes it in `rope_parameters`, 4 beside."""
        return self.rope_theta if self.rope_parameters is None else self.rope_parameters.rope_theta


class PixtralLayer(nn.Module):
    """Attention and a gated feed-forward block, each behind an RMSNorm."""

    def __init__(self, cfg: PixtralVisionConfig):
        super().__init__()
        size = cfg.hidden_size
        self.attention_norm, self.ffn_norm = RMSNorm(size, 1e-5), RMSNorm(size, 1e-5)
        self.attention = VisionAttention(size, cfg.num_attention_heads, bias=False, names=("qkv_proj", "o_proj"))
        self.feed_forward = GatedMLP(size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, starts: Tensor, angles: Tensor) -> Tensor:
        """x: (rows, hidden), starts and angles: as in `VisionAttention` -> (rows, hidden)."""
        x = self.attention(self.attention_norm(x), x, starts, angles)
        return self.feed_forward(self.ffn_norm(x), x)


class PixtralEncoder(nn.Module):
    """The layers that are read."""

    def __init__(self, cfg: PixtralVisionConfig, count: int):
        super().__init__()
        self.layers = nn.ModuleList(PixtralLayer(cfg) for _ in range(count))
        self.unused = tuple(f"layers.{number}.*" for number in range(count, cfg.num_hidden_layers))


class PixtralVision(nn.Module):
    """Pixtral's tower (Agrawal et al., 2024).

    :param feature_layer: as in `ClipVision`.
    """

    def __init__(self, cfg: PixtralVisionConfig, feature_layer: int | Sequence[int] | None = None):
        super().__init__()
        self.patch_size, self.theta = cfg.patch_size, cfg.theta
        self.head_dim = cfg.hidden_size // cfg.num_attention_heads
        self.wanted = feature_layers(feature_layer, cfg.num_hidden_layers)
        self.patch_conv = PatchEmbedding(cfg.num_channels, cfg.hidden_size, (cfg.patch_size, cfg.patch_size))
        self.ln_pre = RMSNorm(cfg.hidden_size, 1e-5)
        self.transformer = PixtralEncoder(cfg, max(self.wanted))

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """images: each (channels, height, width) -> for each (rows * columns, hidden * layers), row by row."""
        sizes = [(image.shape[1] // self.patch_size, image.shape[2] // self.patch_size) for image in images]
        lengths = [rows * columns for rows, columns in sizes]
        patches = torch.cat([self.patch_conv.cut(image[None]) for image in images])
        x = self.ln_pre(self.patch_conv(patches))
        where = torch.cat([grid_positions(1, rows, columns, 1, x.device) for rows, columns in sizes])
        frequencies = axial_frequencies(self.head_dim, self.theta, x.device)
        angles = axial_angles(*where.unbind(1), frequencies[0::2], frequencies[1::2])
        x = layer_states(self.transformer.layers, x, self.wanted, segments(lengths, x.device), angles)
        return list(x.split(lengths))
