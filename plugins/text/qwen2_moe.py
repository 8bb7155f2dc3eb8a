"""Qwen2-MoE: Qwen2 with many small experts, and a shared one for all tokens behind a gate of its own."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import (
    Attention,
    CausalLM,
    Experts,
    GatedMLP,
    Linear,
    QKVLinear,
    RMSNorm,
    Rope,
    Router,
    RowLinear,
)
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class Qwen2MoeConfig(TextConfig):
    qkv_bias: bool = True
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    num_experts: int = 60
    num_experts_per_tok: int = 4
    norm_topk_prob: bool = False
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = []

    def window(self, layer: int) -> int:
        """Every other layer below `max_window_layers` slides, when `use_sliding_window` says so at all."""
        if not self.use_sliding_window or not self.sliding_window:
            return 0
        by_rule = layer < self.max_window_layers and layer % 2 == 0
        slides = self.layer_types[layer] == "sliding_attention" if self.layer_types else by_rule
        return self.sliding_window if slides else 0

    def is_sparse(self, layer: int) -> bool:
        return (
            layer not in self.mlp_only_layers and self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        )


class SelfAttention(nn.Module):
    def __init__(self, cfg: Qwen2MoeConfig, layer: int):
        super().__init__()
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, cfg.qkv_bias)
        rope = Rope(cfg.head_dim, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=rope, window=cfg.window(layer))
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class SparseMoe(nn.Module):
    def __init__(self, cfg: Qwen2MoeConfig):
        super().__init__()
        hidden, count = cfg.hidden_size, cfg.num_experts
        self.gate = Router(hidden, count, cfg.num_experts_per_tok, normalize=1 if cfg.norm_topk_prob else None)
        self.experts = Experts(count, hidden, cfg.moe_intermediate_size, cfg.hidden_act)
        self.shared_expert = GatedMLP(hidden, cfg.shared_expert_intermediate_size, cfg.hidden_act)
        self.shared_expert_gate = Linear(hidden, 1)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        shared = self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return self.experts(x, *self.gate(x), residual + shared)


class Block(nn.Module):
    def __init__(self, cfg: Qwen2MoeConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        dense = not cfg.is_sparse(layer)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act) if dense else SparseMoe(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Qwen2Moe(CausalLM):
    def __init__(self, cfg: Qwen2MoeConfig):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "mlp_only_layers": [1],
    }
    variants = {
        "normalised": {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": []},
        "whole": {"use_sliding_window": False, "qkv_bias": False},
    }
    name = "Qwen2MoeForCausalLM"
    reference = f"transformers:{name}"
    return [Architecture(name, Qwen2Moe, Qwen2MoeConfig, reference=reference, tiny=tiny, variants=variants)]
