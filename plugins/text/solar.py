"""Solar Pro: Llama's shape, deepened: some layers' inputs are kept and blended into those of later ones."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class SolarConfig(TextConfig):
    """`bskcn_1` and `bskcn_2` list layers whose input is kept, in two places; `bskcn_3`, `bskcn_4` those that use it.

    `bskcn_tv` is the share of the kept one, in training and in use.
    """

    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = 2047
    bskcn_1: list[int] = [12, 20, 32, 44]
    bskcn_2: list[int] = [20, 32]
    bskcn_3: list[int] = [16, 24, 36, 48]
    bskcn_4: list[int] = [28, 40]
    bskcn_tv: list[float] = [0.9, 0.8]


class SelfAttention(nn.Module):
    def __init__(self, cfg: SolarConfig):
        super().__init__()
        heads, kv_heads, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias)
        rope = Rope(cfg.head_dim, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=rope, window=cfg.sliding_window or 0)
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class Block(nn.Module):
    """The state is the hidden state and the two kept ones; before something is kept, these are the embeddings."""

    def __init__(self, cfg: SolarConfig, layer: int):
        super().__init__()
        self.keeps = layer in cfg.bskcn_1, layer in cfg.bskcn_2
        self.blends = layer in cfg.bskcn_3, layer in cfg.bskcn_4
        self.share = cfg.bskcn_tv[1]
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias)

    def forward(self, state: Tensor | tuple[Tensor, ...], batch: Batch) -> tuple[Tensor, ...]:
        x, *kept = state if isinstance(state, tuple) else (state, state, state)  # each (tokens, hidden_size)
        kept = [x if keeps else old for keeps, old in zip(self.keeps, kept, strict=True)]
        for blends, old in zip(self.blends, kept, strict=True):
            if blends:
                x = self.share * old + (1 - self.share) * x
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x), *kept


class Solar(CausalLM):
    def __init__(self, cfg: SolarConfig):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))

    def finish(self, state: tuple[Tensor, ...]) -> Tensor:
        return super().finish(state[0])


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "sliding_window": 24,
        "bskcn_1": [1, 4],
        "bskcn_2": [2],
        "bskcn_3": [3, 5],
        "bskcn_4": [4],
    }
    return [Architecture("SolarForCausalLM", Solar, SolarConfig, ignore=("*.rotary_emb.inv_freq",), tiny=tiny)]
