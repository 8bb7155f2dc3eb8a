"""Llama: RMSNorm, rotary grouped-query attention, SwiGLU; and the families that are Llama with other flags.

Mistral adds a sliding window, InternLM spells its flags differently, the first Yi its norms; for Aquila and XVERSE the
name is the difference.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class LlamaConfig(TextConfig):
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def window(self) -> int:
        return 0


class MistralConfig(LlamaConfig):
    sliding_window: int | None = None

    @property
    def window(self) -> int:
        return self.sliding_window or 0


class InternLMConfig(LlamaConfig):
    """`bias` covers q, k, v and o; the base of the rotary embedding stands in `rotary`."""

    aliases = {"bias": "attention_bias"}
    attention_bias: bool = True

    @model_validator(mode="before")
    @classmethod
    def _rotary(cls, data: Any) -> Any:
        base = (data.get("rotary") or {}).get("base")
        return data if base is None else {"rope_theta": float(base), **data}


class SelfAttention(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        heads, kv_heads, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias)
        rope = Rope(cfg.head_dim, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=rope, window=cfg.window)
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: LlamaConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Llama(CausalLM):
    def __init__(self, cfg: LlamaConfig):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "eos_token_id": 2,
}
"""Of Llama 7B, which larger models do not repeat; and of Mistral 7B."""
MISTRAL_SIZES = SIZES | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}


def norms_of_yi(weights: Iterable[tuple[str, Tensor]], cfg: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        name = name.replace(".ln1.", ".input_layernorm.").replace(".ln2.", ".post_attention_layernorm.")
        yield name, tensor


INNER = {  # model_type and defaults
    "LlamaForCausalLM": ("llama", SIZES),
    "MistralForCausalLM": ("mistral", MISTRAL_SIZES),
}


@hookimpl
def register_architectures() -> list[Architecture]:
    names = {
        "LlamaForCausalLM": LlamaConfig,
        "LLaMAForCausalLM": LlamaConfig,  # before transformers had the model
        "YiForCausalLM": LlamaConfig,  # later ones are named LlamaForCausalLM
        "MistralForCausalLM": MistralConfig,
        "AquilaForCausalLM": LlamaConfig,
        "AquilaModel": LlamaConfig,  # the first Aquila checkpoints were published under this name
        "XverseForCausalLM": LlamaConfig,
        "InternLMForCausalLM": InternLMConfig,
    }
    mistral = {**TINY, "sliding_window": 24}
    return [
        Architecture(
            name,
            Llama,
            config,
            ignore=("*.rotary_emb.inv_freq",),
            weights=norms_of_yi if name == "YiForCausalLM" else None,
            reference="transformers:MistralForCausalLM" if config is MistralConfig else "transformers:LlamaForCausalLM",
            tiny=mistral if config is MistralConfig else TINY,
            model_type=INNER.get(name, (None, {}))[0],
            defaults=INNER.get(name, (None, {}))[1],
        )
        for name, config in names.items()
    ]
