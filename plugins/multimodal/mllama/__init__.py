"""Llama 3.2 Vision: Llama with layers between that attend to images, cut into tiles (arXiv 2407.21783, section 7).

Decisions: an image is one token, and its tiles' states are keys that some layers read; a token sees the images before
it, up to the next text between images. Tokens before every image pass those layers by, as text alone does. Tiles that
an image does not fill are computed all the same, since the others attend to them; only their states are dropped.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.inputs.images import ImageSettings, normalize, patches, resize
from modelport.inputs.processor import InputProcessor, MediaItem, ProcessorFiles
from modelport.inputs.tokenizer import Tokenizer
from modelport.modeling import (
    Attention,
    CausalLM,
    ColumnLinear,
    CrossAttention,
    Embedding,
    GatedMLP,
    Linear,
    MergedLinear,
    QKVLinear,
    RMSNorm,
    Rope,
    RowLinear,
)
from modelport.plugin import Architecture, hookimpl
from modelport.plugins.multimodal.mllama.tiles import TilesConfig, Tower, canvas, fitted, gate

modelport_api = 1
BOS_TEXT = "<|begin_of_text|>"
EXTRA_TOKENS = 8
"""Rows of the embedding that the head has no logits for; the image's token is the first of them."""
TEXT_DEFAULTS = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "bos_token_id": 128000,
                 "eos_token_id": 128001}  # fmt: skip


class MllamaConfig(TextConfig):
    """The language model's entries are those of `text_config`."""

    vision_config: TilesConfig = TilesConfig()
    image_token_index: int = 128256
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(rope_theta=500000.0)
    cross_attention_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)

    @model_validator(mode="before")
    @classmethod
    def _text_and_around(cls, data: Any) -> Any:
        text = {key: value for key, value in (data.get("text_config") or {}).items() if value is not None}
        around = {key: value for key, value in data.items() if value is not None}
        around.setdefault("image_token_index", around.get("image_token_id", 128256))
        return {**TEXT_DEFAULTS, **around, **text}


class MllamaImageSettings(ImageSettings):
    size: dict[str, int] = {"height": 224, "width": 224}
    resample: int | None = 2
    max_image_tiles: int = 4
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)


class MllamaInputs(InputProcessor):
    modalities = {"image": None}

    def __init__(self, config: MllamaConfig, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        super().__init__(config, text, files, tokenizer)
        tile = config.vision_config.image_size
        size = {"size": {"height": tile, "width": tile}}
        self.images = MllamaImageSettings.model_validate({**size, **files.settings()})
        self.tiles = min(self.images.max_image_tiles, config.vision_config.max_num_tiles)

    def placeholder(self, modality: str) -> str:
        return "<|image|>"

    def placeholder_id(self, modality: str) -> int:
        return self.config.image_token_index

    def image(self, image) -> MediaItem:
        settings, vision, tile = self.images, self.config.vision_config, self.images.size["height"]
        rows, columns = canvas(image.height, image.width, self.tiles, tile)
        height, width = fitted(image.height, image.width, rows, columns, tile)
        pixels = np.zeros((rows * tile, columns * tile, 3), dtype=np.uint8)
        pixels[:height, :width] = np.asarray(resize(image, (height, width), settings.resample))
        scale = settings.rescale_factor if settings.do_rescale else None
        mean, std = (settings.image_mean, settings.image_std) if settings.do_normalize else (None, None)
        filled = np.zeros((vision.max_num_tiles, 3, tile, tile), dtype=np.float32)
        filled[: rows * columns] = patches(normalize(pixels, scale, mean, std), (tile, tile))
        tensors = {
            "pixel_values": torch.from_numpy(filled),
            "aspect_ratio_ids": torch.tensor(vision.supported_aspect_ratios.index((rows, columns)) + 1),
            "num_tiles": torch.tensor(rows * columns),
        }
        return MediaItem(
            "image", [self.config.image_token_index], tensors, is_row=[False], num_keys=rows * columns * vision.states
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """A text that has its beginning written gets no other one."""
        return super().encode(text, add_special_tokens and BOS_TEXT not in text)


class SelfAttention(nn.Module):
    def __init__(self, cfg: MllamaConfig):
        super().__init__()
        heads, kv_heads, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size)
        self.attn = Attention(heads, kv_heads, size, rope=Rope(size, cfg.rope_parameters))
        self.o_proj = RowLinear(heads * size, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class AttentionToImages(nn.Module):
    def __init__(self, cfg: MllamaConfig):
        super().__init__()
        heads, kv_heads, self.head_dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        keys = kv_heads * self.head_dim
        self.q_proj = ColumnLinear(cfg.hidden_size, heads * self.head_dim)
        self.kv_proj = MergedLinear(cfg.hidden_size, (keys, keys), ("k_proj", "v_proj"))
        self.q_norm = RMSNorm(self.head_dim, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, cfg.rms_norm_eps)
        self.attn = CrossAttention(heads, kv_heads, self.head_dim)
        self.o_proj = RowLinear(heads * self.head_dim, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        if batch.encoded.states is not None:
            k, v = self.kv_proj(batch.encoded.states.to(x.dtype)).unflatten(1, (2, -1, self.head_dim)).unbind(1)
            self.attn.write(self.k_norm(k), v, batch)
        q = self.q_norm(self.q_proj(x).unflatten(1, (-1, self.head_dim)))
        return self.o_proj(self.attn(q, batch))


class Block(nn.Module):
    def __init__(self, cfg: MllamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class ImageBlock(nn.Module):
    """Changes the rows that see an image."""

    def __init__(self, cfg: MllamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.cross_attn = AttentionToImages(cfg)
        self.cross_attn_attn_gate = gate()
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)
        self.cross_attn_mlp_gate = gate()

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        if batch.encoded is None:
            return x
        rows = x[batch.encoded.rows]
        rows = rows + self.cross_attn_attn_gate.tanh() * self.cross_attn(self.input_layernorm(rows), batch)
        rows = rows + self.cross_attn_mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(rows))
        return x.index_copy(0, batch.encoded.rows, rows)


class Mllama(CausalLM):
    media_modules: tuple[nn.Module, ...] = ()
    """None: layers on every stage read what the tower makes."""

    def __init__(self, cfg: MllamaConfig):
        crossing = set(cfg.cross_attention_layers)
        super().__init__(
            cfg, lambda c, i: ImageBlock(c) if i in crossing else Block(c), RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        )
        self.model.embed_tokens = Embedding(cfg.vocab_size + EXTRA_TOKENS, cfg.hidden_size)
        self.vision_model = Tower(cfg.vision_config)
        self.multi_modal_projector = Linear(cfg.vision_config.vision_output_dim, cfg.hidden_size, bias=True)

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        pixels, ids, counts = (
            torch.stack([item[name] for item in items]) for name in ("pixel_values", "aspect_ratio_ids", "num_tiles")
        )
        states = self.vision_model(pixels.to(self.vision_model.class_embedding.dtype), ids, counts)
        filled = [one[:count].flatten(0, 1) for one, count in zip(states, counts.tolist(), strict=True)]
        return list(self.multi_modal_projector(torch.cat(filled)).split([len(one) for one in filled]))


RENAME = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.language_model.model.": "model.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
"""Names of published checkpoints, of transformers 5, and what it writes for both together."""


@hookimpl
def register_architectures() -> list[Architecture]:
    text = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "cross_attention_layers": [1, 3],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 4,
        "intermediate_size": 48,
        "vision_output_dim": 96,
        "image_size": 12,
        "patch_size": 6,
        "intermediate_layers_indices": [1, 2],
    }
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}  # fmt: skip
    return [
        Architecture(
            "MllamaForConditionalGeneration",
            Mllama,
            MllamaConfig,
            rename=RENAME,
            ignore=("*.rotary_emb.inv_freq",),
            inputs=MllamaInputs,
            reference="modelport.plugins.multimodal.mllama.reference:reference",
            tiny={"text_config": text, "vision_config": vision, "image_token_index": 320},
            files={"preprocessor_config.json": {"size": {"height": 12, "width": 12}, "max_image_tiles": 4}},
            variants={"llama3_rope": {"text_config": {**text, "rope_parameters": scaled}}},
        )
    ]
