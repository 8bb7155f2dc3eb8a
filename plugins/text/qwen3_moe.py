"""Qwen3-MoE: Qwen3 with many small experts for a feed-forward layer, none of them shared."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, Experts, GatedMLP, QKVLinear, RMSNorm, Rope, Router, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class Qwen3MoeConfig(TextConfig):
    aliases = {"num_local_experts": "num_experts"}  # as transformers 5 writes it
    max_position_embeddings: int = 32768
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    moe_intermediate_size: int = 768
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = []

    @property
    def window(self) -> int:
        return self.sliding_window or 0 if self.use_sliding_window else 0

    def is_sparse(self, layer: int) -> bool:
        return (
            layer not in self.mlp_only_layers and self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        )


class SelfAttention(nn.Module):
    def __init__(self, cfg: Qwen3MoeConfig):
        super().__init__()
        heads, kv_heads, size, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias)
        self.q_norm = RMSNorm(size, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(size, cfg.rms_norm_eps)
        self.attn = Attention(heads, kv_heads, size, rope=Rope(size, cfg.rope_parameters), window=cfg.window)
        self.o_proj = RowLinear(heads * size, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x)
        return self.o_proj(self.attn(self.q_norm(q), self.k_norm(k), v, batch), residual)


class SparseMoe(nn.Module):
    def __init__(self, cfg: Qwen3MoeConfig):
        super().__init__()
        hidden, count, normalize = cfg.hidden_size, cfg.num_experts, 1 if cfg.norm_topk_prob else None
        self.gate = Router(hidden, count, cfg.num_experts_per_tok, normalize=normalize)
        self.experts = Experts(count, hidden, cfg.moe_intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.experts(x, *self.gate(x), residual)


class Block(nn.Module):
    def __init__(self, cfg: Qwen3MoeConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        dense = not cfg.is_sparse(layer)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act) if dense else SparseMoe(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Qwen3Moe(CausalLM):
    def __init__(self, cfg: Qwen3MoeConfig):
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
        "head_dim": 32,
        "max_position_embeddings": 512,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "moe_intermediate_size": 48,
    }
    variants = {
        "not_normalised": {"norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True},
        "some_dense": {"decoder_sparse_step": 2},
        "sliding": {"use_sliding_window": True, "sliding_window": 24, "mlp_only_layers": [0]},
    }
    name = "Qwen3MoeForCausalLM"
    reference = f"transformers:{name}"
    return [Architecture(name, Qwen3Moe, Qwen3MoeConfig, reference=reference, tiny=tiny, variants=variants)]
