"""StarCoder2: rotary grouped-query attention within a sliding window, LayerNorm, a plain MLP, biases, tied head."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import MLP, Attention, CausalLM, LayerNorm, QKVLinear, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class Starcoder2Config(TextConfig):
    num_key_value_heads: int = 2
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = True
    norm_epsilon: float = 1e-5
    sliding_window: int | None = None
    use_bias: bool = True


class SelfAttention(nn.Module):
    def __init__(self, cfg: Starcoder2Config):
        super().__init__()
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, cfg.use_bias)
        rope = Rope(cfg.head_dim, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=rope, window=cfg.sliding_window or 0)
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, cfg.use_bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: Starcoder2Config, layer: int):
        super().__init__()
        self.input_layernorm = LayerNorm(cfg.hidden_size, cfg.norm_epsilon)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = LayerNorm(cfg.hidden_size, cfg.norm_epsilon)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.use_bias, names=("c_fc", "c_proj"))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Starcoder2(CausalLM):
    def __init__(self, cfg: Starcoder2Config):
        super().__init__(cfg, Block, LayerNorm(cfg.hidden_size, cfg.norm_epsilon))


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
        "sliding_window": 20,
    }
    return [
        Architecture(
            "Starcoder2ForCausalLM",
            Starcoder2,
            Starcoder2Config,
            ignore=("*.rotary_emb.inv_freq",),
            reference="transformers:Starcoder2ForCausalLM",
            tiny=tiny,
        )
    ]
