"""Image towers with learned positions and images of one size: CLIP's and SigLIP's (Dosovitskiy et al., 2020).

Both are as their checkpoints name them below `vision_model.`, which a family's `rename` takes away.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from modelport.modeling.embedding import Embedding
from modelport.modeling.norm import LayerNorm
from modelport.modeling.vision import (
    PatchEmbedding,
    VisionConfig,
    VisionLayer,
    feature_layers,
    layer_states,
    segments,
)


class ClipVisionConfig(VisionConfig):
    """`vision_config` of type clip_vision_model."""

    model_type: Literal["clip_vision_model"] = "clip_vision_model"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


class SiglipVisionConfig(VisionConfig):
    """`vision_config` of type siglip_vision_model."""

    model_type: Literal["siglip_vision_model"] = "siglip_vision_model"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"


class VisionEmbeddings(nn.Module):
    """Patches, a class token before them where there is one, and a learned row for each position."""

    def __init__(self, cfg: VisionConfig, class_token: bool, bias: bool):
        super().__init__()
        self.image_size, size = cfg.image_size, cfg.hidden_size
        self.patch_embedding = PatchEmbedding(cfg.num_channels, size, (cfg.patch_size, cfg.patch_size), bias)
        self.class_embedding = nn.Parameter(torch.empty(size), requires_grad=False) if class_token else None
        self.position_embedding = Embedding(cfg.patches + class_token, size)
        self.unused = ("position_ids",)  # stored by old versions

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (images, channels, image_size, image_size) -> (images, tokens, hidden).

        :raises ValueError: images of another size.
        """
        if pixels.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"pixels {tuple(pixels.shape)}: this tower takes images of {self.image_size} x "
                             f"{self.image_size}")  # fmt: skip
        x = self.patch_embedding(pixels).unflatten(0, (len(pixels), -1))
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        return x + self.position_embedding(torch.arange(x.shape[1], device=x.device))


class VisionEncoder(nn.Module):
    """The layers that are read."""

    def __init__(self, cfg: VisionConfig, count: int):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(cfg) for _ in range(count))
        self.unused = tuple(f"layers.{number}.*" for number in range(count, cfg.num_hidden_layers))


class ClipVision(nn.Module):
    """CLIP's tower (Radford et al., 2021): a class token, and a norm before the layers.

    :param feature_layer: whose states are the result, as `feature_layers` takes them; of several, joined.
    :raises ValueError: a layer that there is not.
    """

    def __init__(self, cfg: ClipVisionConfig, feature_layer: int | Sequence[int] | None = None):
        super().__init__()
        self.wanted = feature_layers(feature_layer, cfg.num_hidden_layers)
        self.embeddings = VisionEmbeddings(cfg, class_token=True, bias=False)
        self.pre_layrnorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)  # so spelled in checkpoints
        self.encoder = VisionEncoder(cfg, max(self.wanted))
        self.unused = ("post_layernorm.weight", "post_layernorm.bias")  # for the pooled class token

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (images, channels, image_size, image_size) -> (images, 1 + patches, hidden * layers)."""
        x = self.embeddings(pixels)
        images, tokens, _ = x.shape
        x = self.pre_layrnorm(x.flatten(0, 1))
        x = layer_states(self.encoder.layers, x, self.wanted, segments([tokens] * images, x.device))
        return x.unflatten(0, (images, tokens))


class SiglipVision(nn.Module):
    """SigLIP's tower (Zhai et al., 2023), without its pooling head.

    :param feature_layer: as in `ClipVision`; with None, the last state goes through the final norm.
    """

    def __init__(self, cfg: SiglipVisionConfig, feature_layer: int | Sequence[int] | None = None):
        super().__init__()
        self.wanted = feature_layers(feature_layer, cfg.num_hidden_layers)
        self.embeddings = VisionEmbeddings(cfg, class_token=False, bias=True)
        self.encoder = VisionEncoder(cfg, max(self.wanted))
        self.post_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps) if feature_layer is None else None
        left_out = () if feature_layer is None else ("post_layernorm.weight", "post_layernorm.bias")
        self.unused = ("head.*", *left_out)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (images, channels, image_size, image_size) -> (images, patches, hidden * layers)."""
        x = self.embeddings(pixels)
        images, tokens, _ = x.shape
        starts = segments([tokens] * images, x.device)
        x = layer_states(self.encoder.layers, x.flatten(0, 1), self.wanted, starts)
        if self.post_layernorm is not None:
            x = self.post_layernorm(x)
        return x.unflatten(0, (images, tokens))
