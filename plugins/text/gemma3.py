"""Gemma 3's language model: Gemma 2's norms, normalised heads of queries and keys, five sliding layers to a global one.

The two kinds of layers turn their heads by bases of their own, of which only the global ones' is ever scaled.
"""

from typing import Any

from pydantic import field_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class Gemma3Config(TextConfig):
    aliases = {"hidden_activation": "hidden_act"}
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256.0
    sliding_window: int | None = 4096
    sliding_window_pattern: int = 6  # every so many layers one sees everything
    layer_types: list[str] | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: bool = False
    rope_by_layer_type: dict[str, RopeParameters] = {
        "full_attention": RopeParameters(rope_theta=1e6),
        "sliding_attention": RopeParameters(),
    }

    @field_validator("use_bidirectional_attention")
    @classmethod
    def _generates(cls, value: Any) -> Any:
        if value:
            raise ValueError(
                f"use_bidirectional_attention={value}: tokens that see those after them make embeddings, not text; "
                "take a checkpoint that generates"
            )
        return value

    def layer_type(self, layer: int) -> str:
        if self.layer_types:
            return self.layer_types[layer]
        return "sliding_attention" if (layer + 1) % self.sliding_window_pattern else "full_attention"


def norm(cfg: Gemma3Config, size: int = 0) -> RMSNorm:
    return RMSNorm(size or cfg.hidden_size, cfg.rms_norm_eps, offset=1.0)


class SelfAttention(nn.Module):
    def __init__(self, cfg: Gemma3Config, layer: int):
        super().__init__()
        heads, kv_heads, size, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.attention_bias
        kind = cfg.layer_type(layer)
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias)
        self.q_norm, self.k_norm = norm(cfg, size), norm(cfg, size)
        self.attn = Attention(
            heads,
            kv_heads,
            size,
            rope=Rope(size, cfg.rope(kind)),
            scale=cfg.query_pre_attn_scalar**-0.5,
            window=(cfg.sliding_window or 0) if kind == "sliding_attention" else 0,
            softcap=cfg.attn_logit_softcapping or 0.0,
        )
        self.o_proj = RowLinear(heads * size, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.qkv_proj(x)
        return self.o_proj(self.attn(self.q_norm(q), self.k_norm(k), v, batch))


class Block(nn.Module):
    def __init__(self, cfg: Gemma3Config, layer: int):
        super().__init__()
        self.input_layernorm = norm(cfg)
        self.self_attn = SelfAttention(cfg, layer)
        self.post_attention_layernorm = norm(cfg)
        self.pre_feedforward_layernorm = norm(cfg)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)
        self.post_feedforward_layernorm = norm(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), batch))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma3(CausalLM):
    def __init__(self, cfg: Gemma3Config):
        scale, cap = cfg.hidden_size**0.5, cfg.final_logit_softcapping or 0.0
        super().__init__(cfg, Block, norm(cfg), embed_scale=scale, logit_softcap=cap)


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 20,
        "sliding_window_pattern": 3,
        "max_position_embeddings": 512,
    }
    full, slides = "full_attention", "sliding_attention"
    variants = {
        # as google/gemma-3-4b-it writes it
        "4b": {
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "rope_theta": 1e5,
            "rope_local_base_freq": 100.0,
        },
        "layer-types": {
            "layer_types": [full, slides, slides, full],
            "rope_parameters": {full: {"rope_type": "default", "rope_theta": 1e5}, slides: {"rope_theta": 50.0}},
        },
        "pattern": {"sliding_window_pattern": 6, "num_hidden_layers": 7},
        "flags": {"attention_bias": True, "final_logit_softcapping": 3.0, "tie_word_embeddings": False},
    }
    return [
        Architecture(
            "Gemma3ForCausalLM",
            Gemma3,
            Gemma3Config,
            reference="transformers:Gemma3ForCausalLM",
            tiny=tiny,
            variants=variants,
            model_type="gemma3_text",
            defaults={
                "vocab_size": 262208,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "eos_token_id": 1,
            },
        )
    ]
