"""Falcon: three generations of blocks under one name, chosen by flags.

7B has attention and MLP side by side under one norm, and one key head for all (`multi_query`); 40B and 180B
(`new_decoder_architecture`) a norm for each, and groups of heads; the RW models a sequential block, ALiBi and biases.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import MLP, Alibi, Attention, CausalLM, LayerNorm, QKVLinear, Rope, RowLinear, ungroup_qkv
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class FalconConfig(TextConfig):
    aliases = {
        "n_embed": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_key_value_heads",
        "num_kv_heads": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
        "activation": "hidden_act",
    }
    hidden_act: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    alibi: bool = False
    new_decoder_architecture: bool = False
    num_ln_in_parallel_attn: int = 2  # of the new architecture; 1 in Falcon 2
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False

    @model_validator(mode="before")
    @classmethod
    def _first_release(cls, data: Any) -> Any:
        """Then, only what is the new architecture now could have several key heads, and only its code read them."""
        return {"new_decoder_architecture": "n_head_kv" in data, **data}

    @property
    def kv_heads(self) -> int:
        """Of the attention itself; old checkpoints may say something else where `multi_query` decides."""
        if self.new_decoder_architecture:
            return self.num_key_value_heads
        return 1 if self.multi_query else self.num_attention_heads


class SelfAttention(nn.Module):
    def __init__(self, cfg: FalconConfig):
        super().__init__()
        heads, size = cfg.num_attention_heads, cfg.head_dim
        self.query_key_value = QKVLinear(cfg.hidden_size, heads, cfg.kv_heads, size, cfg.bias)
        alibi = Alibi(heads, scale=size**-0.5) if cfg.alibi else None
        rope = None if cfg.alibi else Rope(size, cfg.rope_parameters)
        self.attn = Attention(heads, cfg.kv_heads, size, rope=rope, alibi=alibi)
        self.dense = RowLinear(cfg.hidden_size, cfg.hidden_size, cfg.bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.dense(self.attn(*self.query_key_value(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: FalconConfig, layer: int):
        super().__init__()
        size = cfg.hidden_size
        self.parallel = cfg.parallel_attn or cfg.new_decoder_architecture
        if cfg.new_decoder_architecture and cfg.num_ln_in_parallel_attn == 2:
            first, second = "ln_attn", "ln_mlp"
        else:
            first, second = "input_layernorm", "input_layernorm" if self.parallel else "post_attention_layernorm"
        self.norms = first, second
        for name in dict.fromkeys(self.norms):
            self.add_module(name, LayerNorm(size, cfg.layer_norm_epsilon))
        self.self_attention = SelfAttention(cfg)
        wide, names = cfg.intermediate_size or 4 * size, ("dense_h_to_4h", "dense_4h_to_h")
        self.mlp = MLP(size, wide, cfg.hidden_act, cfg.bias, names)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        first, second = (self.get_submodule(name) for name in self.norms)
        normed = first(x)
        after = self.self_attention(normed, batch, residual=x)
        if self.parallel:
            return self.mlp(normed if second is first else second(x), residual=after)
        return self.mlp(second(after), residual=after)


class Falcon(CausalLM):
    def __init__(self, cfg: FalconConfig):
        super().__init__(cfg, Block, LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon))


PREFIXES = {
    "transformer.word_embeddings.": "model.embed_tokens.",
    "transformer.h.": "model.layers.",
    "transformer.ln_f.": "model.norm.",
}


def ungroup(weights: Iterable[tuple[str, Tensor]], cfg: FalconConfig) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name, ungroup_qkv(tensor, cfg.kv_heads, cfg.head_dim) if ".query_key_value." in name else tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    grouped = {"new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 2}
    variants = {
        "40b": grouped,
        "falcon-2": {**grouped, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 112, "rope_theta": 500042.0},
        "multi-head": {"multi_query": False, "bias": True, "activation": "relu"},
        "sequential": {"parallel_attn": False, "tie_word_embeddings": False},
    }
    names = "FalconForCausalLM", "RWForCausalLM"  # the second before transformers had the model
    return [
        Architecture(
            name,
            Falcon,
            FalconConfig,
            rename=PREFIXES,
            weights=ungroup,
            reference="transformers:FalconForCausalLM",
            tiny=tiny,
            variants=variants,
        )
        for name in names
    ]
