"""PhiMoE: Mixtral's shape with LayerNorms, biases, long rotary factors, and a router of its own (sparsemixer)."""

from collections.abc import Iterable, Iterator
from typing import Literal

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import Attention, CausalLM, Experts, LayerNorm, QKVLinear, Rope, RowLinear, SparseMixer
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class PhimoeConfig(TextConfig):
    max_position_embeddings: int = 131072
    rope_parameters: RopeParameters = RopeParameters(rope_theta=1e6)
    rms_norm_eps: float = 1e-5  # of LayerNorms
    sliding_window: int | None = None
    attention_bias: bool = False
    lm_head_bias: bool = False
    num_local_experts: int = 16
    num_experts_per_tok: Literal[2] = 2  # sparsemixer chooses two
    router_jitter_noise: float = 0.01


class SelfAttention(nn.Module):
    def __init__(self, cfg: PhimoeConfig):
        super().__init__()
        heads, kv_heads, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias)
        rope = Rope(cfg.head_dim, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=rope, window=cfg.sliding_window or 0)
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class SparseMoe(nn.Module):
    def __init__(self, cfg: PhimoeConfig):
        super().__init__()
        count, names = cfg.num_local_experts, ("w1", "w3", "w2")
        self.gate = SparseMixer(cfg.hidden_size, count, cfg.router_jitter_noise)
        self.experts = Experts(count, cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, names=names)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.experts(x, *self.gate(x), residual)


class Block(nn.Module):
    def __init__(self, cfg: PhimoeConfig, layer: int):
        super().__init__()
        self.input_layernorm = LayerNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = LayerNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.block_sparse_moe = SparseMoe(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.block_sparse_moe(self.post_attention_layernorm(x), residual=x)


class Phimoe(CausalLM):
    def __init__(self, cfg: PhimoeConfig):
        super().__init__(cfg, Block, LayerNorm(cfg.hidden_size, cfg.rms_norm_eps), head_bias=cfg.lm_head_bias)


def published_names(weights: Iterable[tuple[str, Tensor]], cfg: PhimoeConfig) -> Iterator[tuple[str, Tensor]]:
    """transformers 5 can write the layer under its own names, with all experts in one tensor."""
    for name, tensor in weights:
        yield name.replace(".mlp.router.", ".mlp.gate.").replace(".mlp.", ".block_sparse_moe."), tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "attention_bias": True,
        "lm_head_bias": True,
        "num_local_experts": 6,
        "router_jitter_noise": 0.1,
    }
    long = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        # longer than what is checked: the reference knows no other factors than the short ones
        "original_max_position_embeddings": 256,
        "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 1.2, 1.5, 2.0, 4.0, 8.0, 12.0, 16.0],
        "short_mscale": 1.1,
        "long_mscale": 1.3,
    }
    variants = {
        "longrope": {"rope_parameters": long},
        "no_biases": {"attention_bias": False, "lm_head_bias": False},
        "sliding": {"sliding_window": 20},
    }
    return [
        Architecture(
            name,
            Phimoe,
            PhimoeConfig,
            weights=published_names,
            reference="transformers:PhimoeForCausalLM",
            tiny=tiny,
            variants=variants,
        )
        for name in ("PhiMoEForCausalLM", "PhimoeForCausalLM")
    ]
