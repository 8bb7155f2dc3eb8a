"""Granite, PowerLM: Llama's shape with four factors: on embeddings, scores, what a layer adds, and (divisor) logits."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class GraniteConfig(TextConfig):
    attention_bias: bool = False
    mlp_bias: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0  # in place of 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0


class SelfAttention(nn.Module):
    def __init__(self, cfg: GraniteConfig):
        super().__init__()
        heads, kv_heads, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias)
        rope = Rope(cfg.head_dim, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=rope, scale=cfg.attention_multiplier)
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch))


class Block(nn.Module):
    def __init__(self, cfg: GraniteConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias)
        self.multiplier = cfg.residual_multiplier

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = x.add(self.self_attn(self.input_layernorm(x), batch), alpha=self.multiplier)
        return x.add(self.mlp(self.post_attention_layernorm(x)), alpha=self.multiplier)


class Granite(CausalLM):
    def __init__(self, cfg: GraniteConfig):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        scales = {"embed_scale": cfg.embedding_multiplier, "logit_scale": 1 / cfg.logits_scaling}
        super().__init__(cfg, Block, norm, **scales)


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.15,
        "residual_multiplier": 0.22,
        "logits_scaling": 9.0,
    }
    return [
        Architecture(
            "GraniteForCausalLM",
            Granite,
            GraniteConfig,
            ignore=("*.rotary_emb.inv_freq",),
            reference="transformers:GraniteForCausalLM",
            tiny=tiny,
        )
    ]
