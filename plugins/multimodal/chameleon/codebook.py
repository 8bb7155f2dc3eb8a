"""The encoder that turns an image into codes of a learned book, VQGAN's (arXiv 2012.09841)."""

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class CodebookConfig(BaseModel):
    """`vq_config`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    embed_dim: int = 256
    num_embeddings: int = 8192
    double_latent: bool = False
    latent_channels: int = 256
    resolution: int = 512
    in_channels: int = 3
    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] | None = None
    attn_type: str | None = "vanilla"


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    """Two convolutions, each behind a group norm and SiLU; x: (images, channels, height, width)."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = _norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(nn.functional.silu(self.norm2(inner)))


class PixelAttention(nn.Module):
    """Attention of every place to all places, with one head as wide as the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(x)
        q, k, v = (part(inner).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class Encoder(nn.Module):
    """Pixels to latents, half as high and wide with every level but the last (Esser et al., 2021)."""

    def __init__(self, cfg: CodebookConfig):
        super().__init__()
        channels, resolution, vanilla = cfg.base_channels, cfg.resolution, cfg.attn_type == "vanilla"
        self.conv_in = nn.Conv2d(cfg.in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, factor in enumerate(cfg.channel_multiplier):
            down, attends = nn.Module(), vanilla and resolution in (cfg.attn_resolutions or ())
            down.block, down.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(cfg.num_res_blocks):
                down.block.append(Residual(channels, cfg.base_channels * factor))
                channels = cfg.base_channels * factor
                down.attn.append(PixelAttention(channels) if attends else nn.Identity())
            down.downsample = nn.Identity()
            if level < len(cfg.channel_multiplier) - 1:
                down.downsample = nn.Module()
                down.downsample.conv = nn.Conv2d(channels, channels, 3, stride=2)
                resolution //= 2
            self.down.append(down)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = Residual(channels, channels), Residual(channels, channels)
        self.mid.attn_1 = PixelAttention(channels) if vanilla else nn.Identity()
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, cfg.latent_channels * (2 if cfg.double_latent else 1), 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for down in self.down:
            for block, attention in zip(down.block, down.attn, strict=True):
                x = attention(block(x))
            if not isinstance(down.downsample, nn.Identity):  # padded at the right and at the bottom only
                x = down.downsample.conv(nn.functional.pad(x, (0, 1, 0, 1)))
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """Pixels to the nearest codes."""

    def __init__(self, cfg: CodebookConfig):
        super().__init__()
        self.encoder = Encoder(cfg)
        self.quant_conv = nn.Conv2d(cfg.latent_channels, cfg.embed_dim, 1)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(cfg.num_embeddings, cfg.embed_dim)
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (images, channels, height, width) -> (images, codes) int64, row by row."""
        codes = self.quantize.embedding.weight
        latents = self.quant_conv(self.encoder(pixels.to(codes.dtype))).flatten(2).transpose(1, 2)
        return ((codes * codes).sum(1) - 2 * latents @ codes.T).argmin(-1)
