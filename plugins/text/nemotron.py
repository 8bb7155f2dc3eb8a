"""Nemotron, Minitron: LayerNorm with weights around zero, a plain MLP of squared ReLU, partly rotary attention."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import MLP, Attention, CausalLM, LayerNorm, QKVLinear, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class NemotronConfig(TextConfig):
    # Early configs name the rotated part so.
    aliases = {"rope_percent": "partial_rotary_factor", "rope_percentage": "partial_rotary_factor"}
    hidden_act: str = "relu2"
    max_position_embeddings: int = 4096
    norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.5)
    attention_bias: bool = False
    mlp_bias: bool = False


def norm(cfg: NemotronConfig) -> LayerNorm:
    return LayerNorm(cfg.hidden_size, cfg.norm_eps, offset=1.0)


class SelfAttention(nn.Module):
    def __init__(self, cfg: NemotronConfig):
        super().__init__()
        heads, kv_heads, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=Rope(cfg.head_dim, cfg.rope_parameters))
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: NemotronConfig, layer: int):
        super().__init__()
        self.input_layernorm = norm(cfg)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = norm(cfg)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Nemotron(CausalLM):
    def __init__(self, cfg: NemotronConfig):
        super().__init__(cfg, Block, norm(cfg))


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 512,
    }
    return [
        Architecture(
            "NemotronForCausalLM",
            Nemotron,
            NemotronConfig,
            ignore=("*.rotary_emb.inv_freq",),
            reference="transformers:NemotronForCausalLM",
            tiny=tiny,
        )
    ]
