"""Cohere (Command R, Aya, Command A): attention and MLP side by side under one norm without bias, scaled logits.

Cohere 2 (Command R7B) alternates: layers with a sliding window are rotary, those that see everything know no positions.
"""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, LayerNorm, QKVLinear, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class CohereConfig(TextConfig):
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    logit_scale: float = 0.0625
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    use_qk_norm: bool = False
    rope_parameters: RopeParameters = RopeParameters(rope_theta=500000.0)

    def window(self, layer: int) -> int:
        return 0

    def is_rotary(self, layer: int) -> bool:
        return True


class Cohere2Config(CohereConfig):
    rope_parameters: RopeParameters = RopeParameters()
    sliding_window: int | None = 4096
    sliding_window_pattern: int = 4  # every so many layers one sees everything
    layer_types: list[str] | None = None

    def window(self, layer: int) -> int:
        by_rule = (layer + 1) % self.sliding_window_pattern != 0
        slides = self.layer_types[layer] == "sliding_attention" if self.layer_types else by_rule
        return (self.sliding_window or 0) if slides else 0

    def is_rotary(self, layer: int) -> bool:
        return self.window(layer) > 0


class SelfAttention(nn.Module):
    def __init__(self, cfg: CohereConfig, layer: int):
        super().__init__()
        heads, kv_heads, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim

        def norm(count: int) -> nn.Module:
            return LayerNorm((count, size), cfg.layer_norm_eps, bias=False) if cfg.use_qk_norm else nn.Identity()

        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, cfg.attention_bias)
        self.q_norm, self.k_norm = norm(heads), norm(kv_heads)
        rope = Rope(size, cfg.rope_parameters, interleaved=True) if cfg.is_rotary(layer) else None
        self.attn = Attention(heads, kv_heads, size, rope=rope, window=cfg.window(layer))
        self.o_proj = RowLinear(heads * size, cfg.hidden_size, cfg.attention_bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x)
        return self.o_proj(self.attn(self.q_norm(q), self.k_norm(k), v, batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: CohereConfig, layer: int):
        super().__init__()
        self.input_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps, bias=False)
        self.self_attn = SelfAttention(cfg, layer)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        normed = self.input_layernorm(x)
        return self.mlp(normed, residual=self.self_attn(normed, batch, residual=x))


class Cohere(CausalLM):
    def __init__(self, cfg: CohereConfig):
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps, bias=False)
        super().__init__(cfg, Block, norm, logit_scale=cfg.logit_scale)


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
        "pad_token_id": 0,
    }
    flags = {"logit_scale": 0.8, "attention_bias": True, "tie_word_embeddings": False, "rope_theta": 500.0}
    first, second = "CohereForCausalLM", "Cohere2ForCausalLM"
    return [
        Architecture(
            first,
            Cohere,
            CohereConfig,
            reference=f"transformers:{first}",
            tiny=tiny,
            variants={"command-r-plus": {"use_qk_norm": True}, "flags": {**flags, "num_key_value_heads": 4}},
        ),
        Architecture(
            second,
            Cohere,
            Cohere2Config,
            reference=f"transformers:{second}",
            tiny={**tiny, "sliding_window": 20},
            variants={"flags": flags, "pattern": {"sliding_window_pattern": 2}},
        ),
    ]
