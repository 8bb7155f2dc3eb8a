"""Phi-3, Phi-3.5 and Phi-4: Llama's blocks with projections stored fused, and LongRoPE's two sets of angles.

A sequence that grows past `original_max_position_embeddings` is computed again with the long set, as the authors do;
`Rope` and the engine see to it.
"""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class Phi3Config(TextConfig):
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    sliding_window: int | None = None


class SelfAttention(nn.Module):
    def __init__(self, cfg: Phi3Config):
        super().__init__()
        heads, kv_heads, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size)
        rope = Rope(size, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, size, rope=rope, window=cfg.sliding_window or 0)
        self.o_proj = RowLinear(heads * size, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: Phi3Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Phi3(CausalLM):
    def __init__(self, cfg: Phi3Config):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


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
        "original_max_position_embeddings": 512,
        "pad_token_id": 0,
    }
    longrope = {
        # Beyond all that a check computes: a reference that computes a sequence whole gives its beginning long factors
        # too, so the crossing has a test of its own, against transformers' `generate`.
        "original_max_position_embeddings": 200,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.05, 1.1, 1.3, 1.5, 2.0, 2.1, 2.4],
            "long_factor": [1.1, 1.5, 2.0, 4.0, 8.0, 12.0, 20.0, 32.0],
        },
    }
    part = {k: v[:6] if isinstance(v, list) else v for k, v in longrope["rope_scaling"].items()}
    variants = {
        "mini-4k": {"num_key_value_heads": 4, "sliding_window": 21},
        "mini-128k": longrope,
        "phi-4-mini": {
            **longrope,
            "rope_scaling": part,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
        },
    }
    return [
        Architecture(
            "Phi3ForCausalLM",
            Phi3,
            Phi3Config,
            ignore=("*.rotary_emb.inv_freq",),
            reference="transformers:Phi3ForCausalLM",
            tiny=tiny,
            variants=variants,
        )
    ]
