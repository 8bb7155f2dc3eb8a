"""GPT-J: attention and MLP side by side under one norm, neighbours rotated in pairs, a head with a bias."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import MLP, Attention, CausalLM, LayerNorm, QKVLinear, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class GPTJConfig(TextConfig):
    aliases = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
    }
    hidden_act: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    rotary_dim: int = 64


class SelfAttention(nn.Module):
    def __init__(self, cfg: GPTJConfig):
        super().__init__()
        heads, size = cfg.num_attention_heads, cfg.head_dim
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, heads, size)
        self.attn = Attention(heads, heads, size, rope=Rope(cfg.rotary_dim, cfg.rope_parameters, interleaved=True))
        self.out_proj = RowLinear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.out_proj(self.attn(*self.qkv_proj(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: GPTJConfig, layer: int):
        super().__init__()
        size, wide = cfg.hidden_size, cfg.intermediate_size or 4 * cfg.hidden_size
        self.ln_1 = LayerNorm(size, cfg.layer_norm_epsilon)
        self.attn = SelfAttention(cfg)
        self.mlp = MLP(size, wide, cfg.hidden_act, bias=True, names=("fc_in", "fc_out"))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        normed = self.ln_1(x)
        return self.mlp(normed, residual=self.attn(normed, batch, residual=x))


class GPTJ(CausalLM):
    def __init__(self, cfg: GPTJConfig):
        super().__init__(cfg, Block, LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon), head_bias=True)


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "n_embd": 96,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "rotary_dim": 12,
    }
    return [
        Architecture(
            "GPTJForCausalLM",
            GPTJ,
            GPTJConfig,
            rename={
                "transformer.wte.": "model.embed_tokens.",
                "transformer.h.": "model.layers.",
                "transformer.ln_f.": "model.norm.",
            },
            ignore=("*.attn.bias", "*.attn.masked_bias", "*.attn.embed_positions"),  # stored masks and sines
            reference="transformers:GPTJForCausalLM",
            tiny=tiny,
            variants={"wide": {"n_inner": 112, "activation_function": "gelu", "rotary_dim": 24}},
        )
    ]
