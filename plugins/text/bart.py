"""BART: an encoder, a decoder that attends to it; learned positions, norms after sublayers (arXiv 1910.13461)."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import (
    Activation,
    Attention,
    ColumnLinear,
    CrossAttention,
    Embedding,
    EncoderAttention,
    LayerNorm,
    LMHead,
    MergedLinear,
    QKVLinear,
    RowLinear,
)
from modelport.plugin import Architecture, hookimpl

modelport_api = 1
OFFSET = 2
"""Rows of the position tables before position 0: once the padding token's."""


class BartConfig(TextConfig):
    aliases = {"d_model": "hidden_size", "encoder_layers": "num_hidden_layers", "activation_function": "hidden_act",
               "encoder_attention_heads": "num_attention_heads"}  # fmt: skip
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu"
    encoder_ffn_dim: int = 4096
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    scale_embedding: bool = False
    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = 2
    forced_eos_token_id: int | list[int] | None = 2


class FeedForward(nn.Module):
    """The sublayer that encoder and decoder share; its names stand beside the attention's."""

    def __init__(self, cfg: BartConfig, width: int):
        super().__init__()
        self.fc1 = ColumnLinear(cfg.hidden_size, width, bias=True)
        self.act = Activation(cfg.hidden_act)
        self.fc2 = RowLinear(width, cfg.hidden_size, bias=True)
        self.final_layer_norm = LayerNorm(cfg.hidden_size)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.final_layer_norm(self.fc2(self.act(self.fc1(x)), x))


class SelfAttention(nn.Module):
    def __init__(self, cfg: BartConfig, heads: int, attention: nn.Module):
        super().__init__()
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, heads, cfg.hidden_size // heads, bias=True)
        self.attn = attention
        self.out_proj = RowLinear(cfg.hidden_size, cfg.hidden_size, bias=True)

    def forward(self, x: Tensor, where: Tensor | Batch) -> Tensor:
        return self.out_proj(self.attn(*self.qkv_proj(x), where), x)


class EncoderAttentionToKeys(nn.Module):
    def __init__(self, cfg: BartConfig):
        super().__init__()
        size, heads = cfg.hidden_size, cfg.decoder_attention_heads
        self.q_proj = ColumnLinear(size, size, bias=True)
        self.kv_proj = MergedLinear(size, (size, size), ("k_proj", "v_proj"), bias=True)
        self.attn = CrossAttention(heads, heads, size // heads)
        self.out_proj = RowLinear(size, size, bias=True)
        self.head_dim = size // heads

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        if batch.encoded.states is not None:
            keys = self.kv_proj(batch.encoded.states).unflatten(1, (2, -1, self.head_dim))
            self.attn.write(*keys.unbind(1), batch)
        q = self.q_proj(x).unflatten(1, (-1, self.head_dim))
        return self.out_proj(self.attn(q, batch), x)


class EncoderLayer(FeedForward):
    def __init__(self, cfg: BartConfig):
        super().__init__(cfg, cfg.encoder_ffn_dim)
        heads = cfg.num_attention_heads
        self.self_attn = SelfAttention(cfg, heads, EncoderAttention(cfg.hidden_size // heads))
        self.self_attn_layer_norm = LayerNorm(cfg.hidden_size)

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        return self.feed_forward(self.self_attn_layer_norm(self.self_attn(x, starts)))


class DecoderLayer(FeedForward):
    def __init__(self, cfg: BartConfig):
        super().__init__(cfg, cfg.decoder_ffn_dim)
        heads = cfg.decoder_attention_heads
        self.self_attn = SelfAttention(cfg, heads, Attention(heads, heads, cfg.hidden_size // heads))
        self.self_attn_layer_norm = LayerNorm(cfg.hidden_size)
        self.encoder_attn = EncoderAttentionToKeys(cfg)
        self.encoder_attn_layer_norm = LayerNorm(cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = self.self_attn_layer_norm(self.self_attn(x, batch))
        return self.feed_forward(self.encoder_attn_layer_norm(self.encoder_attn(x, batch)))


class Stack(nn.Module):
    """Positions, their norm, and layers; token embeddings are shared and lie outside."""

    def __init__(self, cfg: BartConfig, layers: list[nn.Module]):
        super().__init__()
        self.embed_positions = Embedding(cfg.max_position_embeddings + OFFSET, cfg.hidden_size)
        self.layernorm_embedding = LayerNorm(cfg.hidden_size)
        self.layers = nn.ModuleList(layers)

    def begin(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.layernorm_embedding(x + self.embed_positions(positions + OFFSET))


class Bart(nn.Module):
    def __init__(self, cfg: BartConfig):
        super().__init__()
        scale = cfg.hidden_size**0.5 if cfg.scale_embedding else 1.0
        self.model = nn.Module()
        self.model.shared = Embedding(cfg.vocab_size, cfg.hidden_size, scale)
        self.model.encoder = Stack(cfg, [EncoderLayer(cfg) for _ in range(cfg.num_hidden_layers)])
        self.model.decoder = Stack(cfg, [DecoderLayer(cfg) for _ in range(cfg.decoder_layers)])
        tied = self.model.shared if cfg.tie_word_embeddings else None
        self.lm_head = LMHead(cfg.hidden_size, cfg.vocab_size, tied=tied, bias=True)

    def encode(self, token_ids: Tensor, starts: Tensor) -> Tensor:
        lens = starts.diff()
        positions = torch.arange(len(token_ids), device=token_ids.device) - starts[:-1].long().repeat_interleave(lens)
        x = self.model.encoder.begin(self.model.shared(token_ids), positions)
        for layer in self.model.encoder.layers:
            x = layer(x, starts)
        return x

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.model.shared(token_ids)

    @property
    def blocks(self) -> list:
        return [self._begin, *self.model.decoder.layers]

    def _begin(self, x: Tensor, batch: Batch) -> Tensor:
        return self.model.decoder.begin(x, batch.positions)

    def finish(self, state: Tensor) -> Tensor:
        return state


def weights(stream: Iterable[tuple[str, Tensor]], cfg: BartConfig) -> Iterator[tuple[str, Tensor]]:
    """Shared embeddings under one name; the bias of the logits, which bare encoder-decoders do not store."""
    shared, bias = False, False
    for name, tensor in stream:
        if name.endswith("embed_tokens.weight") or name == "model.shared.weight":
            if not shared:
                yield "model.shared.weight", tensor
            shared = True
        elif name == "final_logits_bias":
            bias = True
            yield "lm_head.bias", tensor[0]
        else:
            yield name, tensor
    if not bias:
        yield "lm_head.bias", torch.zeros(cfg.vocab_size)


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 112,
        "max_position_embeddings": 512,
        "pad_token_id": 1,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
    return [
        Architecture(
            name,
            Bart,
            BartConfig,
            rename={"shared.": "model.shared.", "encoder.": "model.encoder.", "decoder.": "model.decoder."},
            weights=weights,
            reference="transformers:BartForConditionalGeneration",
            tiny=tiny,
            variants={"scaled": {"scale_embedding": True, "activation_function": "relu"}},
        )
        for name in ("BartForConditionalGeneration", "BartModel")  # the second: checkpoints that nobody tuned
    ]
