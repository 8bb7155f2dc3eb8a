"""BLIP-2: learned queries read an image through cross attention and stand before the prompt (Li et al., 2023).

The language model is a decoder (OPT). Decision: an image needs no placeholder, as in the published processor, which
puts its rows before everything, the first token too; where a prompt has one the rows take its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from modelport.config import MultimodalConfig, TextConfig
from modelport.inputs.images import ImageSettings, preprocess
from modelport.inputs.processor import Expanded, InputProcessor, MediaItem, ProcessorFiles
from modelport.inputs.tokenizer import Tokenizer
from modelport.modeling import (
    Activation,
    LayerNorm,
    Linear,
    MediaLM,
    VisionConfig,
    VisionEmbeddings,
    VisionLayer,
    segments,
)
from modelport.plugin import Architecture, hookimpl

if TYPE_CHECKING:
    from PIL.Image import Image

modelport_api = 1


class Blip2VisionConfig(VisionConfig):
    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    qkv_bias: Literal[True] = True


class QFormerConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2


class Blip2Config(MultimodalConfig):
    vision_config: Blip2VisionConfig = Blip2VisionConfig()
    qformer_config: QFormerConfig = QFormerConfig()
    num_query_tokens: int = 32
    image_token_index: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _decoders_only(cls, data: Any) -> Any:
        kind = (data.get("text_config") or {}).get("model_type", "opt")
        if kind in ("t5", "mt5", "umt5"):
            raise ValueError(
                f"text_config has model_type {kind!r}, an encoder-decoder, which BLIP-2 is not built around here; use "
                "a checkpoint with OPT, such as blip2-opt-2.7b"
            )
        if "image_token_id" in data:
            data = {"image_token_index": data["image_token_id"], **data}
        return data


class Blip2Inputs(InputProcessor):
    modalities = {"image": 1}
    embeddable = ("image",)

    def __init__(self, config: Blip2Config, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        super().__init__(config, text, files, tokenizer)
        edge = config.vision_config.image_size
        self.images = ImageSettings.model_validate({"size": {"height": edge, "width": edge}, **files.settings()})

    def placeholder(self, modality: str) -> str:
        return "<image>"

    def placeholder_id(self, modality: str) -> int:
        """Without one in the configuration an id that no token has."""
        given = self.config.image_token_index
        return self.text.vocab_size if given is None else given

    def image(self, image: Image) -> MediaItem:
        pixels = torch.from_numpy(preprocess(image, self.images))
        tokens = [self.placeholder_id("image")] * self.config.num_query_tokens
        return MediaItem("image", tokens, {"pixel_values": pixels})

    def expand(self, token_ids: list[int], items: Mapping[str, Sequence[MediaItem]]) -> Expanded:
        here = self.placeholder_id("image")
        if items.get("image") and here not in token_ids:
            token_ids = [here, *token_ids]
        return super().expand(token_ids, items)


class Tower(nn.Module):
    """A ViT whose last states, a class token among them, go through a norm."""

    def __init__(self, cfg: Blip2VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(cfg, class_token=True, bias=True)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            VisionLayer(cfg, names=("qkv", "projection")) for _ in range(cfg.num_hidden_layers)
        )
        self.post_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (images, channels, image_size, image_size) -> (images, 1 + patches, hidden)."""
        x = self.embeddings(pixels)
        images, tokens, _ = x.shape
        starts, x = segments([tokens] * images, x.device), x.flatten(0, 1)
        for layer in self.encoder.layers:
            x = layer(x, starts)
        return self.post_layernorm(x).unflatten(0, (images, tokens))


class Output(nn.Module):
    """`LayerNorm(dense(x) + residual)`."""

    def __init__(self, width: int, cfg: QFormerConfig):
        super().__init__()
        self.dense = Linear(width, cfg.hidden_size, bias=True)
        self.LayerNorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x, residual))


class QueryAttention(nn.Module):
    """Attention of the queries of each image to `source`, then `Output`.

    :param width: of what is attended to.
    """

    def __init__(self, cfg: QFormerConfig, width: int):
        super().__init__()
        self.heads, size = cfg.num_attention_heads, cfg.hidden_size
        self.attention = nn.Module()
        self.attention.query = Linear(size, size, bias=True)
        self.attention.key = Linear(width, size, bias=True)
        self.attention.value = Linear(width, size, bias=True)
        self.output = Output(size, cfg)

    def forward(self, x: Tensor, source: Tensor, images: int) -> Tensor:
        """x: (images * queries, size), source: (images * rows, width) -> (images * queries, size)."""
        parts = (self.attention.query(x), self.attention.key(source), self.attention.value(source))
        q, k, v = (part.view(images, -1, self.heads, part.shape[1] // self.heads).transpose(1, 2) for part in parts)
        found = nn.functional.scaled_dot_product_attention(q, k, v)  # (images, heads, queries, head_dim)
        return self.output(found.transpose(1, 2).flatten(2).flatten(0, 1), x)


class QueryLayer(nn.Module):
    def __init__(self, cfg: QFormerConfig, width: int, index: int):
        super().__init__()
        self.attention = QueryAttention(cfg, cfg.hidden_size)
        looks = index % cfg.cross_attention_frequency == 0
        self.crossattention = QueryAttention(cfg, width) if looks else None
        self.intermediate_query = nn.Module()
        self.intermediate_query.dense = Linear(cfg.hidden_size, cfg.intermediate_size, bias=True)
        self.act = Activation(cfg.hidden_act)
        self.output_query = Output(cfg.intermediate_size, cfg)

    def forward(self, x: Tensor, image: Tensor, images: int) -> Tensor:
        """x: (images * queries, size), image: (images * rows, width) -> (images * queries, size)."""
        x = self.attention(x, x, images)
        if self.crossattention is not None:
            x = self.crossattention(x, image, images)
        return self.output_query(self.act(self.intermediate_query.dense(x)), x)


class QFormer(nn.Module):
    """BERT over the queries, whose every second layer looks at the image."""

    def __init__(self, cfg: QFormerConfig, width: int):
        super().__init__()
        self.layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(QueryLayer(cfg, width, i) for i in range(cfg.num_hidden_layers))

    def forward(self, queries: Tensor, states: Tensor) -> Tensor:
        """queries: (1, queries, size), states: (images, rows, width) -> (images * queries, size)."""
        images = len(states)
        x = self.layernorm(queries.expand(images, -1, -1).flatten(0, 1))
        for layer in self.encoder.layer:
            x = layer(x, states.flatten(0, 1), images)
        return x


class Blip2(MediaLM):
    def __init__(self, cfg: Blip2Config, language: nn.Module):
        super().__init__(language)
        size = cfg.qformer_config.hidden_size
        self.vision_model = Tower(cfg.vision_config)
        self.query_tokens = nn.Parameter(torch.empty(1, cfg.num_query_tokens, size), requires_grad=False)
        self.qformer = QFormer(cfg.qformer_config, cfg.vision_config.hidden_size)
        self.language_projection = Linear(size, self.hidden_size, bias=True)

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        states = self.vision_model(torch.stack([item["pixel_values"] for item in items]))
        rows = self.language_projection(self.qformer(self.query_tokens.to(states.dtype), states))
        return list(rows.view(len(items), -1, rows.shape[1]))


def weights(stream: Iterator[tuple[str, Tensor]], cfg: Blip2Config) -> Iterator[tuple[str, Tensor]]:
    """Embeddings without the dimension of a batch."""
    for name, tensor in stream:
        if name == "vision_model.embeddings.class_embedding":
            yield name, tensor.flatten()
        elif name == "vision_model.embeddings.position_embedding":
            yield f"{name}.weight", tensor[0]
        else:
            yield name, tensor


def reference(entries: dict) -> nn.Module:
    """transformers' model, which also continues text alone."""
    from transformers import Blip2Config as Config
    from transformers import Blip2ForConditionalGeneration as Published

    class Blip2ForConditionalGeneration(Published):
        def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, use_cache: bool = False) -> Any:
            if pixel_values is None:
                return self.language_model(input_ids, use_cache=use_cache)
            return super().forward(pixel_values=pixel_values, input_ids=input_ids, use_cache=use_cache)

    config = Config(**entries)
    config._attn_implementation = "eager"
    return Blip2ForConditionalGeneration(config)


@hookimpl
def register_architectures() -> list[Architecture]:
    text = {"model_type": "opt", "vocab_size": 320, "hidden_size": 64, "ffn_dim": 112, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 512, "word_embed_proj_dim": 64}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 30, "patch_size": 6}  # fmt: skip
    qformer = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    preprocessor = {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": {"height": 30, "width": 30},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    return [
        Architecture(
            "Blip2ForConditionalGeneration",
            Blip2,
            Blip2Config,
            weights=weights,
            inputs=Blip2Inputs,
            language="text_config",
            reference=reference,
            tiny={
                "text_config": text,
                "vision_config": vision,
                "qformer_config": qformer,
                "num_query_tokens": 5,
                "image_token_index": 319,
            },
            files={"preprocessor_config.json": preprocessor},
            variants={
                "late_norms": {"text_config": {**text, "do_layer_norm_before": False}},
                "looks_always": {"qformer_config": {**qformer, "cross_attention_frequency": 1}},
            },
        )
    ]
