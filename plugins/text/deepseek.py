"""DeepSeek (the first one, with experts): Llama's shape, some experts chosen and some that serve every token."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, Experts, GatedMLP, QKVLinear, RMSNorm, Rope, Router, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class DeepseekConfig(TextConfig):
    attention_bias: bool = False
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 1407
    norm_topk_prob: bool = False

    def is_sparse(self, layer: int) -> bool:
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )


class SelfAttention(nn.Module):
    def __init__(self, cfg: DeepseekConfig):
        super().__init__()
        heads, kv_heads, size, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias)
        self.attn = Attention(heads, kv_heads, size, rope=Rope(size, cfg.rope_parameters))
        self.o_proj = RowLinear(heads * size, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class SparseMoe(nn.Module):
    def __init__(self, cfg: DeepseekConfig):
        super().__init__()
        hidden, count, wide = cfg.hidden_size, cfg.n_routed_experts, cfg.moe_intermediate_size
        normalizes = cfg.norm_topk_prob and cfg.num_experts_per_tok > 1
        self.gate = Router(hidden, count, cfg.num_experts_per_tok, normalize=1 if normalizes else None)
        self.experts = Experts(count, hidden, wide, cfg.hidden_act)
        shared = cfg.n_shared_experts
        self.shared_experts = GatedMLP(hidden, wide * shared, cfg.hidden_act) if shared else None

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.shared_experts is not None:
            residual = self.shared_experts(x, residual)
        return self.experts(x, *self.gate(x), residual)


class Block(nn.Module):
    def __init__(self, cfg: DeepseekConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        dense = not cfg.is_sparse(layer)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act) if dense else SparseMoe(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Deepseek(CausalLM):
    def __init__(self, cfg: DeepseekConfig):
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
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
    }
    return [Architecture("DeepseekForCausalLM", Deepseek, DeepseekConfig, ignore=("*.rotary_emb.inv_freq",), tiny=tiny)]
