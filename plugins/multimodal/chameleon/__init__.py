"""Chameleon: images as tokens of a codebook, among those of text (arXiv 2405.09818).

Decisions: which code a patch has, only the model can say, so a prompt holds `<image>` in its place and the codes' token
embeddings are the rows that take it; the hash of the image tells two prompts apart. Codes are never generated: the
published model masks their logits.
"""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.inputs.images import ImageSettings, preprocess
from modelport.inputs.processor import InputProcessor, MediaItem, ProcessorFiles
from modelport.inputs.tokenizer import Tokenizer
from modelport.modeling import (
    Attention,
    CausalLM,
    GatedMLP,
    LayerNorm,
    LMHead,
    QKVLinear,
    RMSNorm,
    Rope,
    RowLinear,
)
from modelport.plugin import Architecture, hookimpl
from modelport.plugins.multimodal.chameleon.codebook import Codebook, CodebookConfig

modelport_api = 1
LOWEST = torch.finfo(torch.float32).min
IMAGE, BEGIN, END, SEPARATOR = "<image>", "<racm3:break>", "<eoss>", "<reserved08706>"
CODE = "IMGIMG"
"""Codes' names begin with it; their digits follow as letters, A for 0, and one more character."""
DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


class ChameleonConfig(TextConfig):
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    swin_norm: bool = False
    vq_config: CodebookConfig = CodebookConfig()
    vocabulary_map: dict[str, int]

    def token(self, name: str) -> int:
        """:raises ValueError: the vocabulary lacks it."""
        if name not in self.vocabulary_map:
            raise ValueError(f"vocabulary_map of config.json has no {name!r}; download config.json again")
        return self.vocabulary_map[name]

    @cached_property
    def codes(self) -> dict[int, int]:
        """Code -> token."""
        named = {name: token for name, token in self.vocabulary_map.items() if name.startswith(CODE)}
        return {int(name[len(CODE) : -1].translate(DIGITS)): token for name, token in named.items()}


class ChameleonImageSettings(ImageSettings):
    size: dict[str, int] = {"shortest_edge": 512}
    resample: int | None = 1
    do_center_crop: bool | None = True
    crop_size: dict[str, int] | None = {"height": 512, "width": 512}
    rescale_factor: float = 0.0078
    image_mean: tuple[float, ...] = (1.0, 1.0, 1.0)
    image_std: tuple[float, ...] = (1.0, 1.0, 1.0)


class ChameleonInputs(InputProcessor):
    modalities = {"image": None}
    embeddable = ("image",)

    def __init__(self, config: ChameleonConfig, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        super().__init__(config, text, files, tokenizer)
        self.images = ChameleonImageSettings.model_validate(files.settings())
        self.completes = bool(files.processor.get("return_for_text_completion", False))

    def placeholder(self, modality: str) -> str:
        return IMAGE

    def placeholder_id(self, modality: str) -> int:
        return self.config.token(IMAGE)

    def image(self, image) -> MediaItem:
        pixels = torch.from_numpy(preprocess(image, self.images))
        edge = 2 ** (len(self.config.vq_config.channel_multiplier) - 1)
        return self._item((pixels.shape[1] // edge) * (pixels.shape[2] // edge), {"pixel_values": pixels})

    def embedded(self, modality: str, embeds: Tensor, extra: Mapping) -> MediaItem:
        return self._item(len(embeds), {}, embeds)

    def _item(self, rows: int, tensors: dict[str, Tensor], embeds: Tensor | None = None) -> MediaItem:
        begin, here, end = map(self.config.token, (BEGIN, IMAGE, END))
        is_row = [False, *[True] * rows, False]
        return MediaItem("image", [begin, *[here] * rows, end], tensors, is_row, embeds=embeds)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """With the token that ends a question, unless `return_for_text_completion` is set, as published."""
        if add_special_tokens and not self.completes and not text.endswith(SEPARATOR):
            text += SEPARATOR
        return super().encode(text, add_special_tokens)


class SelfAttention(nn.Module):
    def __init__(self, cfg: ChameleonConfig):
        super().__init__()
        heads, kv_heads, size, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias)
        self.q_norm = LayerNorm((heads, size))
        self.k_norm = LayerNorm((kv_heads, size))
        self.attn = Attention(heads, kv_heads, size, rope=Rope(size, cfg.rope_parameters))
        self.o_proj = RowLinear(heads * size, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor | None) -> Tensor:
        q, k, v = self.qkv_proj(x)
        return self.o_proj(self.attn(self.q_norm(q), self.k_norm(k), v, batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: ChameleonConfig, layer: int):
        super().__init__()
        self.norms_results = cfg.swin_norm  # the 34B model's: what comes out of a part is normalised, not what goes in
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        if self.norms_results:
            x = x + self.input_layernorm(self.self_attn(x, batch, residual=None))
            return x + self.post_attention_layernorm(self.mlp(x))
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Head(LMHead):
    """Logits, those of codes as low as can be."""

    def __init__(self, cfg: ChameleonConfig, tied: nn.Module | None):
        super().__init__(cfg.hidden_size, cfg.vocab_size, tied=tied)
        self.vocab_size, self.codes = cfg.vocab_size, sorted(cfg.codes.values())

    def build_tables(self, device: torch.device, max_len: int) -> None:
        self.is_code = torch.zeros(self.vocab_size, dtype=torch.bool, device=device)
        self.is_code[self.codes] = True

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.float().masked_fill(self.is_code, LOWEST)


class Chameleon(CausalLM):
    def __init__(self, cfg: ChameleonConfig):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))
        self.lm_head = Head(cfg, self.model.embed_tokens if cfg.tie_word_embeddings else None)
        self.model.vqmodel = Codebook(cfg.vq_config)
        self.codes = cfg.codes

    def build_tables(self, device: torch.device, max_len: int) -> None:
        self.token_of = torch.zeros(max(self.codes) + 1, dtype=torch.int64)
        self.token_of[list(self.codes)] = torch.tensor(list(self.codes.values()))
        self.token_of = self.token_of.to(device)

    @property
    def media_modules(self) -> list[nn.Module]:
        return [self.model.vqmodel]

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        codes = self.model.vqmodel(torch.stack([item["pixel_values"] for item in items]))
        return list(self.embed(self.token_of[codes].flatten()).unflatten(0, codes.shape))


@hookimpl
def register_architectures() -> list[Architecture]:
    codebook = {
        "embed_dim": 16,
        "num_embeddings": 24,
        "latent_channels": 16,
        "resolution": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 2],
        "num_res_blocks": 1,
    }
    names = [str(code).translate(str.maketrans("0123456789", "ABCDEFGHIJ")) for code in range(24)]
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vq_config": codebook,
        "vocabulary_map": {
            **{f"{CODE}{name}Z": 40 + 2 * i for i, name in enumerate(names)},
            **{IMAGE: 319, BEGIN: 318, END: 316, SEPARATOR: 315},
        },
    }
    settings = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return [
        Architecture(
            "ChameleonForConditionalGeneration",
            Chameleon,
            ChameleonConfig,
            ignore=("*.rotary_emb.inv_freq", "model.vqmodel.post_quant_conv.*"),
            inputs=ChameleonInputs,
            reference="transformers:ChameleonForConditionalGeneration",
            tiny=tiny,
            files={"preprocessor_config.json": settings},
            variants={
                "swin_norm": {"swin_norm": True},
                "biases": {"attention_bias": True, "mlp_bias": True},
                "pixel_attention": {"vq_config": {**codebook, "attn_resolutions": [8]}},
                "tied": {"tie_word_embeddings": True},
            },
        )
    ]
