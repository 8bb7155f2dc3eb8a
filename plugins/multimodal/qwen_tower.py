"""Qwen2-VL's and Qwen2.5-VL's towers: images and films of any size, patches with rotary positions in two dimensions.

Decision: every image or video gives one tensor of rows, whatever lies beside it; their patches are packed for every
product. Angles are computed once for a call, in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from modelport.modeling import (
    MLP,
    GatedMLP,
    LayerNorm,
    PatchEmbedding,
    RMSNorm,
    VisionAttention,
    axial_angles,
    axial_frequencies,
    grid_positions,
    segments,
)

Grid = tuple[int, int, int]
"""Frames (after their merging in pairs), rows and columns of an image's or a video's patches."""


class QwenVisionConfig(BaseModel):
    """What the `vision_config` of every Qwen-VL says."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    depth: int = 32
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class Qwen2VisionConfig(QwenVisionConfig):
    """Of Qwen2-VL."""

    embed_dim: int = 1280
    hidden_size: int = 3584  # of the result
    hidden_act: str = "quick_gelu"
    mlp_ratio: float = 4


class Qwen2_5VisionConfig(QwenVisionConfig):
    """Of Qwen2.5-VL."""

    hidden_size: int = 3584  # of the layers
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    window_size: int = Field(112, description="pixels")
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)


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
        angles, starts = qwen_angles(_where(grids, self.merge, x.device), self.head_dim), frames_of(grids, x.device)
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
        angles = qwen_angles(_where(grids, self.merge, x.device)[rows], self.head_dim)
        frames, within = frames_of(grids, x.device), segments([length * unit for length in lengths], x.device)
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


def qwen_angles(where: Tensor, head_dim: int) -> Tensor:
    """Of patches at `where`, as `grid_positions` gives them; the base is 10,000 in all of Qwen's towers."""
    frequencies = axial_frequencies(head_dim // 2, 10000.0, where.device)
    return axial_angles(*where.unbind(1), frequencies, frequencies)


def _where(grids: Sequence[Grid], merge: int, device: torch.device) -> Tensor:
    return torch.cat([grid_positions(*grid, merge, device) for grid in grids])


def frames_of(grids: Sequence[Grid], device: torch.device) -> Tensor:
    """Where every frame's patches begin, as `segments` has it."""
    return segments([h * w for t, h, w in grids for _ in range(t)], device)
