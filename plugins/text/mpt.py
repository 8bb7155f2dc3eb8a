"""MPT: ALiBi, no biases, flags for what else its trainer could do, which its configuration keeps in `attn_config`.

Decisions: the published code (`MPTForCausalLM`) is the measure, since transformers (`MptForCausalLM`) reads only some
of its flags: neither `alibi_bias_max` nor `kv_n_heads`, `qk_ln`, `no_bias`, `expansion_ratio`, `logit_scale` or
learned positions. Flags that no known checkpoint sets are refused by name.
"""

from typing import Literal

from pydantic import BaseModel, field_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import (
    MLP,
    Alibi,
    Attention,
    Embedding,
    LayerNorm,
    LearnedPositions,
    LMHead,
    QKVLinear,
    RowLinear,
)
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class AttentionConfig(BaseModel):
    attn_type: Literal["multihead_attention", "multiquery_attention", "grouped_query_attention"] = "multihead_attention"
    kv_n_heads: int | None = None
    alibi: bool = False
    alibi_bias_max: float = 8.0
    clip_qkv: float | None = None
    qk_ln: bool = False
    softmax_scale: float | None = None
    prefix_lm: Literal[False] = False
    rope: Literal[False] = False
    qk_gn: Literal[False] = False
    sliding_window_size: Literal[-1] = -1


class MPTConfig(TextConfig):
    aliases = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "max_seq_len": "max_position_embeddings",
    }
    attn_config: AttentionConfig = AttentionConfig(alibi=True)
    expansion_ratio: float = 4
    learned_pos_emb: bool = True  # where ALiBi is not
    no_bias: bool = True
    logit_scale: float | Literal["inv_sqrt_d_model"] | None = None
    norm_type: Literal["low_precision_layernorm", "layernorm"] = "low_precision_layernorm"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    @field_validator("attn_config", mode="before")
    @classmethod
    def _without_nulls(cls, value: dict) -> dict:
        return {"alibi": True} | {k: v for k, v in value.items() if v is not None}

    @property
    def kv_heads(self) -> int:
        kind, heads = self.attn_config.attn_type, self.num_attention_heads
        return 1 if kind == "multiquery_attention" else self.attn_config.kv_n_heads or heads

    @property
    def head_scale(self) -> float:
        return self.hidden_size**-0.5 if self.logit_scale == "inv_sqrt_d_model" else self.logit_scale or 1.0


def norm(cfg: MPTConfig, size: int) -> LayerNorm:
    return LayerNorm(size, cfg.layer_norm_epsilon, bias=not cfg.no_bias)


class SelfAttention(nn.Module):
    def __init__(self, cfg: MPTConfig):
        super().__init__()
        heads, kv_heads, size, flags = cfg.num_attention_heads, cfg.kv_heads, cfg.head_dim, cfg.attn_config
        self.clip = flags.clip_qkv
        self.Wqkv = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias=not cfg.no_bias)
        # over all heads together
        self.q_ln = norm(cfg, heads * size) if flags.qk_ln else nn.Identity()
        self.k_ln = norm(cfg, kv_heads * size) if flags.qk_ln else nn.Identity()
        alibi = Alibi(heads, flags.alibi_bias_max) if flags.alibi else None
        self.attn = Attention(heads, kv_heads, size, alibi=alibi, scale=flags.softmax_scale)
        self.out_proj = RowLinear(heads * size, cfg.hidden_size, bias=not cfg.no_bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        q, k, v = self.Wqkv(x)
        if self.clip is not None:
            q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
        q, k = (ln(part.flatten(1)).view(part.shape) for ln, part in ((self.q_ln, q), (self.k_ln, k)))
        return self.out_proj(self.attn(q, k, v, batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: MPTConfig):
        super().__init__()
        size = cfg.hidden_size
        self.norm_1 = norm(cfg, size)
        self.attn = SelfAttention(cfg)
        self.norm_2 = norm(cfg, size)
        self.ffn = MLP(size, int(cfg.expansion_ratio * size), "gelu", bias=not cfg.no_bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.attn(self.norm_1(x), batch, residual=x)
        return self.ffn(self.norm_2(x), residual=x)


class MPT(nn.Module):
    def __init__(self, cfg: MPTConfig):
        super().__init__()
        size, learned = cfg.hidden_size, cfg.learned_pos_emb and not cfg.attn_config.alibi
        self.wte = Embedding(cfg.vocab_size, size)
        self.wpe = LearnedPositions(cfg.max_position_embeddings, size) if learned else None
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm_f = norm(cfg, size)
        tied = self.wte if cfg.tie_word_embeddings else None
        self.lm_head = LMHead(size, cfg.vocab_size, tied=tied, scale=cfg.head_scale)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.wte(token_ids)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.layers] if self.wpe is None else [self.wpe, *self.layers]

    def finish(self, state: Tensor) -> Tensor:
        return self.norm_f(state)


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {"vocab_size": 320, "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512}
    variants = {
        "clip": {"attn_config": {"clip_qkv": 0.5}},
        "heads-6": {"d_model": 72, "n_heads": 6},  # ALiBi differs where heads are no power of two
        "softmax-scale": {"attn_config": {"softmax_scale": 0.1}},
    }
    return [
        Architecture(
            name,
            MPT,
            MPTConfig,
            rename={"transformer.blocks.": "layers.", "transformer.": ""},
            reference="transformers:MptForCausalLM",
            tiny=tiny,
            variants=variants,
        )
        for name in ("MPTForCausalLM", "MptForCausalLM")  # as published, and as transformers saves it
    ]
