"""EXAONE 3 and 3.5: Llama's shape under GPT-2's names."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class ExaoneConfig(TextConfig):
    aliases = {
        "num_layers": "num_hidden_layers",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "rms_norm_eps",
    }
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True


class SelfAttention(nn.Module):
    def __init__(self, cfg: ExaoneConfig):
        super().__init__()
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=Rope(cfg.head_dim, cfg.rope_parameters))
        self.out_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.out_proj(self.attn(*self.qkv_proj(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: ExaoneConfig, layer: int):
        super().__init__()
        names, wide = ("c_fc_0", "c_fc_1", "c_proj"), cfg.intermediate_size or 4 * cfg.hidden_size
        self.ln_1 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attn = nn.ModuleDict({"attention": SelfAttention(cfg)})
        self.ln_2 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, wide, cfg.hidden_act, names=names)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.attn["attention"](self.ln_1(x), batch, residual=x)
        return self.mlp(self.ln_2(x), residual=x)


class Exaone(CausalLM):
    def __init__(self, cfg: ExaoneConfig):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    rename = {
        "transformer.wte.": "model.embed_tokens.",
        "transformer.h.": "model.layers.",
        "transformer.ln_f.": "model.norm.",
    }
    return [
        Architecture(
            "ExaoneForCausalLM",
            Exaone,
            ExaoneConfig,
            rename=rename,
            ignore=("*.rotary.inv_freq", "*.rotary_emb.inv_freq"),
            tiny=tiny,
        )
    ]
