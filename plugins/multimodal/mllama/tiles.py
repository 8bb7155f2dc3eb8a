"""The image tower of Llama 3.2 Vision: tiles of an image, all of which see each other, and how an image is cut."""

from math import floor
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from modelport.modeling import MLP, Embedding, LayerNorm, PatchEmbedding, QKVLinear, RowLinear


class TilesConfig(BaseModel):
    """`vision_config`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    hidden_size: int = 1280
    hidden_act: str = "gelu"
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    attention_heads: int = 16
    num_channels: int = 3
    intermediate_size: int = 5120
    vision_output_dim: int = 7680
    image_size: int = 448
    patch_size: int = 14
    norm_eps: float = 1e-5
    max_num_tiles: int = 4
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)
    supported_aspect_ratios: tuple[tuple[int, int], ...] = (
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1),
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None}

    @property
    def states(self) -> int:
        """Of one tile: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


def canvas(height: int, width: int, most: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles: what enlarges an image least, else shrinks it least; the fewest tiles of these."""
    layouts = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    scales = {layout: min(layout[0] * tile / height, layout[1] * tile / width) for layout in layouts}
    best = min((scale for scale in scales.values() if scale >= 1), default=max(scales.values()))
    return min((layout for layout in layouts if scales[layout] == best), key=lambda layout: layout[0] * layout[1])


def fitted(height: int, width: int, rows: int, columns: int, tile: int) -> tuple[int, int]:
    """Size of an image within its canvas; at least one of its edges is that of a tile, or it stays as it is."""
    most_height, most_width = min(max(height, tile), rows * tile), min(max(width, tile), columns * tile)
    by_height, by_width = most_height / height, most_width / width
    if by_width < by_height:
        return min(floor(height * by_width) or 1, most_height), most_width
    return most_height, min(floor(width * by_height) or 1, most_width)


def gate() -> nn.Parameter:
    """What a sublayer's result is multiplied by, through tanh."""
    return nn.Parameter(torch.empty(1), requires_grad=False)


class TileAttention(nn.Module):
    """Attention within an image, in which what pads it is seen by what is real, but not by what pads it."""

    def __init__(self, cfg: TilesConfig):
        super().__init__()
        size, heads = cfg.hidden_size, cfg.attention_heads
        self.qkv_proj = QKVLinear(size, heads, heads, size // heads)
        self.o_proj = RowLinear(size, size)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x: (images * length, hidden), real: (images, length) bool."""
        q, k, v = (part.unflatten(0, real.shape) for part in self.qkv_proj(x))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for i, is_real in enumerate(real):
            out[i, is_real] = _attend(q[i, is_real], k[i], v[i])
            out[i, ~is_real] = _attend(q[i, ~is_real], k[i, is_real], v[i, is_real])
        return self.o_proj(out.flatten(0, 1).flatten(1))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(rows, heads, head_dim) each."""
    heads_first = (part.transpose(0, 1)[None] for part in (q, k, v))
    return nn.functional.scaled_dot_product_attention(*heads_first)[0].transpose(0, 1)


class TileLayer(nn.Module):
    def __init__(self, cfg: TilesConfig, gated: bool):
        super().__init__()
        self.input_layernorm = LayerNorm(cfg.hidden_size, cfg.norm_eps)
        self.self_attn = TileAttention(cfg)
        self.post_attention_layernorm = LayerNorm(cfg.hidden_size, cfg.norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, bias=True, names=("fc1", "fc2"))
        self.gate_attn, self.gate_ffn = (gate(), gate()) if gated else (None, None)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), real)
        x = x + (attended if self.gate_attn is None else self.gate_attn.tanh() * attended)
        wide = self.mlp(self.post_attention_layernorm(x))
        return x + (wide if self.gate_ffn is None else self.gate_ffn.tanh() * wide)


class TileLayers(nn.Module):
    def __init__(self, cfg: TilesConfig, layers: int, gated: bool):
        super().__init__()
        self.layers = nn.ModuleList(TileLayer(cfg, gated) for _ in range(layers))


class RatioEmbedding(nn.Module):
    """A gated row for each tile of each layout."""

    def __init__(self, cfg: TilesConfig):
        super().__init__()
        self.shape = (cfg.max_num_tiles, 1, cfg.hidden_size)
        self.embedding = Embedding(len(cfg.supported_aspect_ratios) + 1, cfg.max_num_tiles * cfg.hidden_size)
        self.gate = gate()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x: (images, tiles, states, hidden), ids: (images,)."""
        return x + self.gate.tanh() * self.embedding(ids).unflatten(1, self.shape)


class PositionEmbedding(nn.Module):
    """Rows for the places in a tile, and in each tile of each layout; a gate says how much of either."""

    def __init__(self, cfg: TilesConfig):
        super().__init__()
        self.shape = (cfg.max_num_tiles, cfg.states, cfg.hidden_size)
        self.gate = gate()
        self.embedding = nn.Parameter(torch.empty(cfg.states, cfg.hidden_size), requires_grad=False)
        self.tile_embedding = Embedding(
            len(cfg.supported_aspect_ratios) + 1, cfg.max_num_tiles * cfg.states * cfg.hidden_size
        )

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = self.gate.tanh()
        return x + (1 - gate) * self.embedding + gate * self.tile_embedding(ids).unflatten(1, self.shape)


class Tower(nn.Module):
    """Layers over all tiles of an image; states between them are read as well."""

    def __init__(self, cfg: TilesConfig):
        super().__init__()
        self.cfg, size, patch = cfg, cfg.hidden_size, (cfg.patch_size, cfg.patch_size)
        self.patch_embedding = PatchEmbedding(cfg.num_channels, size, patch)
        self.class_embedding = nn.Parameter(torch.empty(size), requires_grad=False)
        self.gated_positional_embedding = PositionEmbedding(cfg)
        self.pre_tile_positional_embedding = RatioEmbedding(cfg)
        self.post_tile_positional_embedding = RatioEmbedding(cfg)
        self.layernorm_pre, self.layernorm_post = LayerNorm(size), LayerNorm(size)
        self.transformer = TileLayers(cfg, cfg.num_hidden_layers, gated=False)
        self.global_transformer = TileLayers(cfg, cfg.num_global_layers, gated=True)

    def forward(self, pixels: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        """pixels: (images, tiles, channels, height, width), ids, counts: (images,)
        -> (images, tiles, states, vision_output_dim)."""
        images, tiles = pixels.shape[:2]
        x = self.patch_embedding(pixels.flatten(0, 1)).view(images, tiles, -1, self.cfg.hidden_size)
        x = self.pre_tile_positional_embedding(x, ids)
        x = torch.cat([self.class_embedding.expand(images, tiles, 1, -1), x], dim=2)
        x = self.layernorm_pre(self.gated_positional_embedding(x, ids))
        states = x.shape[2]
        x = nn.functional.pad(x, (0, 0, 0, -states % 8))  # the authors' kernels wanted it so, and tiles attend to it
        shape = x.shape
        real = torch.arange(tiles, device=x.device)[None, :, None] < counts[:, None, None]
        real = (real & (torch.arange(shape[2], device=x.device) < states)).flatten(1)
        x, between = x.flatten(0, 2), []
        for number, layer in enumerate(self.transformer.layers):
            if number in self.cfg.intermediate_layers_indices:
                between.append(x)
            x = layer(x, real)
        x = self.post_tile_positional_embedding(self.layernorm_post(x).view(shape), ids).flatten(0, 2)
        for layer in self.global_transformer.layers:
            x = layer(x, real)
        x = torch.cat([x, torch.stack(between, dim=-1).flatten(1)], dim=1)
        return x.view(*shape[:3], -1)[:, :, :states]
