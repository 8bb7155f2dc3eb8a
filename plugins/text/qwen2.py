"""Qwen2: Llama's shape with biases on q, k and v; later layers may use a sliding window."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class Qwen2Config(TextConfig):
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def window(self, layer: int) -> int:
        """Layers from `max_window_layers` on slide, when `use_sliding_window` says so at all."""
        if not self.use_sliding_window or not self.sliding_window:
            return 0
        slides = self.layer_types[layer] == "sliding_attention" if self.layer_types else layer >= self.max_window_layers
        return self.sliding_window if slides else 0


class SelfAttention(nn.Module):
    def __init__(self, cfg: Qwen2Config, layer: int):
        super().__init__()
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias=True)
        rope = Rope(cfg.head_dim, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=rope, window=cfg.window(layer))
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: Qwen2Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Qwen2(CausalLM):
    def __init__(self, cfg: Qwen2Config):
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
        "tie_word_embeddings": True,
    }
    return [
        Architecture(
            "Qwen2ForCausalLM",
            Qwen2,
            Qwen2Config,
            reference="transformers:Qwen2ForCausalLM",
            tiny=tiny,
            model_type="qwen2",
            defaults={
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 22016,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "max_position_embeddings": 32768,
            },
        )
    ]
