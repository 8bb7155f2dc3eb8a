"""DeciLM and Nemotron-NAS: Llama's shape, in which a search chose for each layer what is left of it.

DeciLM-7B varies the number of key-value heads. Nemotron-NAS lists a configuration per block: attention and feed-forward
layer may each be left out, with their norm, or be one linear layer; else they have sizes of their own.
"""

from pydantic import BaseModel, model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, Linear, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1

WIDTH_MULTIPLE = 256


class AttentionChoice(BaseModel):
    no_op: bool = False
    replace_with_linear: bool = False
    n_heads_in_group: int | None = None  # query heads per key-value head
    window_length: int | None = None
    num_sink_tokens: int | None = None

    @model_validator(mode="after")
    def _runnable(self) -> "AttentionChoice":
        if self.window_length or self.num_sink_tokens:
            raise ValueError(
                f"window_length={self.window_length}, num_sink_tokens={self.num_sink_tokens} in block_configs: "
                "attention to sinks and a window is not supported, and no published model has it"
            )
        return self


class FeedForwardChoice(BaseModel):
    no_op: bool = False
    replace_with_linear: bool = False
    ffn_mult: float | None = None
    intermediate_size: int | None = None


class BlockChoice(BaseModel):
    attention: AttentionChoice = AttentionChoice()
    ffn: FeedForwardChoice = FeedForwardChoice()


class DeciLMConfig(TextConfig):
    attention_bias: bool = False
    mlp_bias: bool = False
    num_key_value_heads_per_layer: list[int] | None = None
    block_configs: list[BlockChoice] | None = None

    @model_validator(mode="after")
    def _one_for_each_layer(self) -> "DeciLMConfig":
        for key in ("num_key_value_heads_per_layer", "block_configs"):
            given = getattr(self, key)
            if given is not None and len(given) != self.num_hidden_layers:
                raise ValueError(f"{key} has {len(given)} entries for num_hidden_layers={self.num_hidden_layers}")
        return self

    def choice(self, layer: int) -> BlockChoice:
        return self.block_configs[layer] if self.block_configs else BlockChoice()

    def kv_heads(self, layer: int) -> int:
        group = self.choice(layer).attention.n_heads_in_group
        if group:
            return self.num_attention_heads // group
        per_layer = self.num_key_value_heads_per_layer
        return per_layer[layer] if per_layer else self.num_key_value_heads

    def width(self, layer: int) -> int:
        """Of the feed-forward layer: 2/3 of `ffn_mult` times the hidden size, rounded up."""
        ffn = self.choice(layer).ffn
        if ffn.ffn_mult is None:
            return ffn.intermediate_size or self.intermediate_size
        return -(-int(2 * ffn.ffn_mult * self.hidden_size / 3) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


class SelfAttention(nn.Module):
    def __init__(self, cfg: DeciLMConfig, layer: int):
        super().__init__()
        heads, kv_heads, bias = cfg.num_attention_heads, cfg.kv_heads(layer), cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=Rope(cfg.head_dim, cfg.rope_parameters))
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class LinearAttention(nn.Module):
    """What stands for attention: nothing is attended to."""

    def __init__(self, cfg: DeciLMConfig):
        super().__init__()
        self.linear_attn = Linear(cfg.hidden_size, cfg.hidden_size, cfg.attention_bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.linear_attn(x, residual)


class LinearMLP(nn.Module):
    def __init__(self, cfg: DeciLMConfig):
        super().__init__()
        self.linear_mlp = Linear(cfg.hidden_size, cfg.hidden_size, cfg.mlp_bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.linear_mlp(x, residual)


class Block(nn.Module):
    def __init__(self, cfg: DeciLMConfig, layer: int):
        super().__init__()
        chosen = cfg.choice(layer)
        self.self_attn = self.mlp = None
        if not chosen.attention.no_op:
            self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
            linear = chosen.attention.replace_with_linear
            self.self_attn = LinearAttention(cfg) if linear else SelfAttention(cfg, layer)
        if not chosen.ffn.no_op:
            self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
            linear, sizes = chosen.ffn.replace_with_linear, (cfg.hidden_size, cfg.width(layer))
            self.mlp = LinearMLP(cfg) if linear else GatedMLP(*sizes, cfg.hidden_act, cfg.mlp_bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        if self.self_attn is not None:
            x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return x if self.mlp is None else self.mlp(self.post_attention_layernorm(x), residual=x)


class DeciLM(CausalLM):
    def __init__(self, cfg: DeciLMConfig):
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
    return [
        Architecture(
            "DeciLMForCausalLM",
            DeciLM,
            DeciLMConfig,
            ignore=("*.rotary_emb.inv_freq",),
            reference="transformers:LlamaForCausalLM",  # where all layers are alike; recorded outputs show the rest
            tiny=tiny,
            variants={
                "per_layer": {"num_key_value_heads_per_layer": [2, 2, 2]},
                "blocks": {
                    "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"intermediate_size": 112}}] * 3
                },
                "biases": {"attention_bias": True, "mlp_bias": True},
                "tied": {"tie_word_embeddings": True},
            },
        )
    ]
