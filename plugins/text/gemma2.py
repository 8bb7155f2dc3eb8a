"""Gemma 2: scaled embeddings, four norms a block, capped scores and logits, every other layer a sliding window."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class Gemma2Config(TextConfig):
    aliases = {"hidden_activation": "hidden_act"}
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256.0
    sliding_window: int = 4096
    layer_types: list[str] | None = None
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0

    def window(self, layer: int) -> int:
        """Even layers slide, unless `layer_types` says otherwise."""
        slides = self.layer_types[layer] == "sliding_attention" if self.layer_types else layer % 2 == 0
        return self.sliding_window if slides else 0


def norm(cfg: Gemma2Config) -> RMSNorm:
    return RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=1.0)


class SelfAttention(nn.Module):
    def __init__(self, cfg: Gemma2Config, layer: int):
        super().__init__()
        heads, kv_heads, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias)
        self.attn = Attention(
            heads,
            kv_heads,
            cfg.head_dim,
            rope=Rope(cfg.head_dim, cfg.rope_parameters),
            scale=cfg.query_pre_attn_scalar**-0.5,
            window=cfg.window(layer),
            softcap=cfg.attn_logit_softcapping or 0.0,
        )
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch))


class Block(nn.Module):
    def __init__(self, cfg: Gemma2Config, layer: int):
        super().__init__()
        self.input_layernorm = norm(cfg)
        self.self_attn = SelfAttention(cfg, layer)
        self.post_attention_layernorm = norm(cfg)
        self.pre_feedforward_layernorm = norm(cfg)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)
        self.post_feedforward_layernorm = norm(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), batch))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2(CausalLM):
    def __init__(self, cfg: Gemma2Config):
        scale, cap = cfg.hidden_size**0.5, cfg.final_logit_softcapping or 0.0
        super().__init__(cfg, Block, norm(cfg), embed_scale=scale, logit_softcap=cap)


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 20,
        "max_position_embeddings": 512,
        # low enough that the caps bend what a random model computes
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    }
    return [
        Architecture(
            "Gemma2ForCausalLM",
            Gemma2,
            Gemma2Config,
            reference="transformers:Gemma2ForCausalLM",
            tiny=tiny,
            model_type="gemma2",
            defaults={
                "vocab_size": 256000,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "max_position_embeddings": 8192,
                "eos_token_id": 1,
            },
        )
    ]
