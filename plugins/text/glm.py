"""GLM-4 in transformers' layout: half of each head rotated in neighbouring pairs, gate and up stored as one.

The 0414 release (`Glm4ForCausalLM`) normalises what attention and MLP give before it is added.
"""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class GlmConfig(TextConfig):
    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1.5625e-7
    attention_bias: bool = True
    eos_token_id: int | list[int] | None = [151329, 151336, 151338]
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.5)


class SelfAttention(nn.Module):
    def __init__(self, cfg: GlmConfig):
        super().__init__()
        heads, kv_heads, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, cfg.attention_bias)
        self.attn = Attention(heads, kv_heads, size, rope=Rope(size, cfg.rope_parameters, interleaved=True))
        self.o_proj = RowLinear(heads * size, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor | None = None) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: GlmConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class NormedBlock(Block):
    def __init__(self, cfg: GlmConfig, layer: int):
        super().__init__(cfg, layer)
        self.post_self_attn_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_mlp_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = x + self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x), batch))
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))


class Glm(CausalLM):
    block: type[nn.Module] = Block

    def __init__(self, cfg: GlmConfig):
        super().__init__(cfg, self.block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


class Glm4(Glm):
    block = NormedBlock


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
        "pad_token_id": 0,
    }
    variants = {
        "flags": {"attention_bias": False, "tie_word_embeddings": True, "num_key_value_heads": 4},
        "rotary": {"partial_rotary_factor": 0.25, "rope_theta": 500.0},
    }
    return [
        Architecture(name, model, GlmConfig, reference=f"transformers:{name}", tiny=tiny, variants=variants)
        for name, model in (("GlmForCausalLM", Glm), ("Glm4ForCausalLM", Glm4))
    ]
