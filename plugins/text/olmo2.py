"""OLMo 2: norms behind attention and MLP instead of before, queries and keys normalised over all heads together."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class Olmo2Config(TextConfig):
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False


class SelfAttention(nn.Module):
    def __init__(self, cfg: Olmo2Config):
        super().__init__()
        heads, kv_heads, size, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias)
        self.q_norm = RMSNorm(heads * size, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(kv_heads * size, cfg.rms_norm_eps)
        self.attn = Attention(heads, kv_heads, size, rope=Rope(size, cfg.rope_parameters))
        self.o_proj = RowLinear(heads * size, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.qkv_proj(x)
        q, k = self.q_norm(q.flatten(1)).view(q.shape), self.k_norm(k.flatten(1)).view(k.shape)
        return self.o_proj(self.attn(q, k, v, batch))


class Block(nn.Module):
    def __init__(self, cfg: Olmo2Config, layer: int):
        super().__init__()
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)
        self.post_feedforward_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = x + self.post_attention_layernorm(self.self_attn(x, batch))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Olmo2(CausalLM):
    def __init__(self, cfg: Olmo2Config):
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
    }
    return [Architecture("Olmo2ForCausalLM", Olmo2, Olmo2Config, reference="transformers:Olmo2ForCausalLM", tiny=tiny)]
