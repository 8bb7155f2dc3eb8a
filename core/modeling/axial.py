"""Image towers for any size, whose patches have rotary positions in two dimensions: Pixtral's and Qwen's.

Decisions: every image or video gives one tensor of rows, whatever lies beside it; their patches are packed for all
products. Angles are computed once for a call, in float32.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from modelport.config import RopeParameters
from modelport.modeling.mlp import MLP, GatedMLP
from modelport.modeling.norm import LayerNorm, RMSNorm
from modelport.modeling.vision import (
    PatchEmbedding,
    VisionAttention,
    VisionConfig,
    axial_angles,
    feature_layers,
    layer_states,
    segments,
)

Grid = tuple[int, int, int]
"""Frames (after their merging in pairs), rows and columns of an image's or a video's patches."""


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
        frequencies = _frequencies(self.head_dim, self.theta, x.device)
        angles = axial_angles(*where.unbind(1), frequencies[0::2], frequencies[1::2])
        x = layer_states(self.transformer.layers, x, self.wanted, segments(lengths, x.device), angles)
        return list(x.split(lengths))


class Qwen2VisionConfig(BaseModel):
    """`vision_config` of Qwen2-VL."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    depth: int = 32
    embed_dim: int = 1280
    hidden_size: int = 3584  # of the result
    hidden_act: str = "quick_gelu"
    mlp_ratio: float = 4
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class Qwen2_5VisionConfig(BaseModel):
    """`vision_config` of Qwen2.5-VL."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    depth: int = 32
    hidden_size: int = 3584  # of the layers
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = Field(112, description="pixels")
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class Patches3D(nn.Module):
    """Patches of several frames; `proj` as the checkpoint names it."""

    def __init__(self, channels: int, size: int, patch: tuple[int, int, int], bias: bool = False):
        super().__init__()
        self.proj = PatchEmbedding(channels, size, patch, bias)


class PatchMerger(nn.Module):
    """Neighbouring patches, which lie behind one another, become one row.

    x: (rows, size) -> (rows / merge ** 2, out_size).
    """

    def __init__(self, norm: nn.Module, size: int, merge: int, out_size: int):
        super().__init__()
        self.width = size * merge**2
        self.ln_q = norm
        self.mlp = MLP(self.width, self.width, "gelu", bias=True, names=("0", "2"), out_size=out_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.width))


class QwenLayer(nn.Module):
    """Attention and a feed-forward block, each behind a norm."""

    def __init__(self, size: int, num_heads: int, norms: tuple[nn.Module, nn.Module], mlp: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attn = VisionAttention(size, num_heads, names=("qkv", "proj"))
        self.mlp = mlp

    def forward(self, x: Tensor, starts: Tensor, angles: Tensor) -> Tensor:
        """x: (rows, size), starts and angles: as in `VisionAttention` -> (rows, size)."""
        x = self.attn(self.norm1(x), x, starts, angles)
        return self.mlp(self.norm2(x), x)


class Qwen2VisionTower(nn.Module):
    """Qwen2-VL's tower (Wang et al., 2024): frames are attended one by one."""

    def __init__(self, cfg: Qwen2VisionConfig):
        super().__init__()
        size, self.merge, self.head_dim = cfg.embed_dim, cfg.spatial_merge_size, cfg.embed_dim // cfg.num_heads
        patch = (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
        self.patch_embed = Patches3D(cfg.in_channels, size, patch)

        def layer() -> QwenLayer:
            mlp = MLP(size, int(size * cfg.mlp_ratio), cfg.hidden_act, bias=True, names=("fc1", "fc2"))
            return QwenLayer(size, cfg.num_heads, (LayerNorm(size, 1e-6), LayerNorm(size, 1e-6)), mlp)

        self.blocks = nn.ModuleList(layer() for _ in range(cfg.depth))
        self.merger = PatchMerger(LayerNorm(size, 1e-6), size, self.merge, cfg.hidden_size)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """patches: (patches, channels * frames * height * width), neighbours that merge behind one another.

        :return: for each grid its (frames * rows * columns / merge ** 2, out) merged rows.
        :raises ValueError: grids that do not fit the patches or the merging.
        """
        check_grids(grids, self.merge, len(patches))
        x = self.patch_embed.proj(patches)
        angles, starts = _qwen_angles(grids, self.merge, self.head_dim, x.device), _frames(grids, x.device)
        for block in self.blocks:
            x = block(x, starts, angles)
        return list(self.merger(x).split([t * h * w // self.merge**2 for t, h, w in grids]))


class Qwen2_5VisionTower(nn.Module):
    """Qwen2.5-VL's tower (Bai et al., 2025): most layers attend within windows of a frame."""

    def __init__(self, cfg: Qwen2_5VisionConfig):
        super().__init__()
        size, self.merge, self.head_dim = cfg.hidden_size, cfg.spatial_merge_size, cfg.hidden_size // cfg.num_heads
        self.window = cfg.window_size // cfg.patch_size // self.merge  # in merged rows
        self.whole = frozenset(cfg.fullatt_block_indexes)
        patch = (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
        self.patch_embed = Patches3D(cfg.in_channels, size, patch)

        def layer() -> QwenLayer:
            mlp = GatedMLP(size, cfg.intermediate_size, cfg.hidden_act, bias=True)
            return QwenLayer(size, cfg.num_heads, (RMSNorm(size, 1e-6), RMSNorm(size, 1e-6)), mlp)

        self.blocks = nn.ModuleList(layer() for _ in range(cfg.depth))
        self.merger = PatchMerger(RMSNorm(size, 1e-6), size, self.merge, cfg.out_hidden_size)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """As `Qwen2VisionTower.forward`."""
        unit = self.merge**2
        check_grids(grids, self.merge, len(patches))
        order, lengths = windows(grids, self.merge, self.window)
        order = order.to(patches.device)
        rows = (order[:, None] * unit + torch.arange(unit, device=patches.device)).flatten()
        x = self.patch_embed.proj(patches)[rows]
        angles = _qwen_angles(grids, self.merge, self.head_dim, x.device)[rows]
        frames, within = _frames(grids, x.device), segments([length * unit for length in lengths], x.device)
        for number, block in enumerate(self.blocks):
            x = block(x, frames if number in self.whole else within, angles)
        merged = self.merger(x)
        out = torch.empty_like(merged)
        out[order] = merged
        return list(out.split([t * h * w // unit for t, h, w in grids]))


def check_grids(grids: Sequence[Grid], merge: int, patches: int) -> None:
    """:raises ValueError: they do not fit the number of patches, or do not divide by `merge`."""
    for grid in grids:
        if grid[1] % merge or grid[2] % merge or min(grid) < 1:
            raise ValueError(f"grid {grid}: rows and columns must be multiples of spatial_merge_size={merge}")
    wanted = sum(t * h * w for t, h, w in grids)
    if wanted != patches:
        raise ValueError(f"grids {list(grids)} have {wanted} patches together, but {patches} are given")


def grid_positions(frames: int, rows: int, columns: int, merge: int, device: torch.device) -> Tensor:
    """Row and column of every patch, (patches, 2) int64; the `merge` x `merge` that merge lie behind one another."""
    where = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    where = where.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2)
    return where.reshape(-1, 2).repeat(frames, 1)


def windows(grids: Sequence[Grid], merge: int, window: int) -> tuple[Tensor, list[int]]:
    """Merged rows of all grids in the order of windows, frame by frame, and how many lie in each window.

    :param window: side of a window, in merged rows; those at the right and at the bottom may be smaller.
    """
    order, lengths, first = [], [], 0
    for frames, rows, columns in grids:
        high, wide = rows // merge, columns // merge
        for frame in torch.arange(first, first + frames * high * wide).view(frames, high, wide):
            for strip in frame.split(window):
                parts = [part.flatten() for part in strip.split(window, dim=1)]
                order += parts
                lengths += map(len, parts)
        first += frames * high * wide
    return torch.cat(order), lengths


def _frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """(dim / 2,) float32, radians per patch."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def _qwen_angles(grids: Sequence[Grid], merge: int, head_dim: int, device: torch.device) -> Tensor:
    where = torch.cat([grid_positions(*grid, merge, device) for grid in grids])
    frequencies = _frequencies(head_dim // 2, 10000.0, device)
    return axial_angles(*where.unbind(1), frequencies, frequencies)


def _frames(grids: Sequence[Grid], device: torch.device) -> Tensor:
    return segments([h * w for t, h, w in grids for _ in range(t)], device)
