"""OLMoE: Llama's shape with many small experts, queries and keys normalised over all heads together, and clipped."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, Experts, QKVLinear, RMSNorm, Rope, Router, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class OlmoeConfig(TextConfig):
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    clip_qkv: float | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False


class SelfAttention(nn.Module):
    def __init__(self, cfg: OlmoeConfig):
        super().__init__()
        heads, kv_heads, size, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.attention_bias
        self.clip = cfg.clip_qkv
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias)
        self.q_norm = RMSNorm(heads * size, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(kv_heads * size, cfg.rms_norm_eps)
        self.attn = Attention(heads, kv_heads, size, rope=Rope(size, cfg.rope_parameters))
        self.o_proj = RowLinear(heads * size, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x)
        q, k = self.q_norm(q.flatten(1)).view(q.shape), self.k_norm(k.flatten(1)).view(k.shape)
        if self.clip is not None:  # what was normalised, too
            for part in (q, k, v):
                part.clamp_(-self.clip, self.clip)
        return self.o_proj(self.attn(q, k, v, batch), residual)


class SparseMoe(nn.Module):
    def __init__(self, cfg: OlmoeConfig):
        super().__init__()
        hidden, count, normalize = cfg.hidden_size, cfg.num_experts, 1 if cfg.norm_topk_prob else None
        self.gate = Router(hidden, count, cfg.num_experts_per_tok, normalize=normalize)
        self.experts = Experts(count, hidden, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.experts(x, *self.gate(x), residual)


class Block(nn.Module):
    def __init__(self, cfg: OlmoeConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = SparseMoe(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Olmoe(CausalLM):
    def __init__(self, cfg: OlmoeConfig):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    }
    variants = {
        "clipped": {"clip_qkv": 0.7},
        "normalised": {"norm_topk_prob": True, "num_key_value_heads": 2, "attention_bias": True},
    }
    return [
        Architecture(name, Olmoe, OlmoeConfig, reference="transformers:OlmoeForCausalLM", tiny=tiny, variants=variants)
        for name in ("OLMoEForCausalLM", "OlmoeForCausalLM")
    ]
