"""Phi-1, Phi-1.5, Phi-2: attention and MLP side by side under one LayerNorm, partly rotary, biases everywhere.

Checkpoints exist in two layouts: transformers', and that of Microsoft's first release (`phi-msft`), whose `Wqkv` is
stacked as `QKVLinear` wants it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import MLP, Attention, CausalLM, LayerNorm, QKVLinear, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class PhiConfig(TextConfig):
    aliases = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_key_value_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
    }
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.5)
    qk_layernorm: bool = False

    @model_validator(mode="before")
    @classmethod
    def _first_release(cls, data: Any) -> Any:
        if "rotary_dim" not in data:
            return data
        return {"partial_rotary_factor": data["rotary_dim"] * data["n_head"] / data["n_embd"], **data}


class SelfAttention(nn.Module):
    def __init__(self, cfg: PhiConfig):
        super().__init__()
        heads, kv_heads, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias=True)
        self.q_layernorm = LayerNorm(size, cfg.layer_norm_eps) if cfg.qk_layernorm else nn.Identity()
        self.k_layernorm = LayerNorm(size, cfg.layer_norm_eps) if cfg.qk_layernorm else nn.Identity()
        self.attn = Attention(heads, kv_heads, size, rope=Rope(size, cfg.rope_parameters))
        self.dense = RowLinear(heads * size, cfg.hidden_size, bias=True)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x)
        return self.dense(self.attn(self.q_layernorm(q), self.k_layernorm(k), v, batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: PhiConfig, layer: int):
        super().__init__()
        size, wide = cfg.hidden_size, cfg.intermediate_size or 4 * cfg.hidden_size
        self.input_layernorm = LayerNorm(size, cfg.layer_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.mlp = MLP(size, wide, cfg.hidden_act, bias=True, names=("fc1", "fc2"))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        normed = self.input_layernorm(x)
        return self.mlp(normed, residual=self.self_attn(normed, batch, residual=x))


class Phi(CausalLM):
    def __init__(self, cfg: PhiConfig):
        super().__init__(cfg, Block, LayerNorm(cfg.hidden_size, cfg.layer_norm_eps), head_bias=True)


PREFIXES = {
    "model.final_layernorm.": "model.norm.",
    "transformer.embd.wte.": "model.embed_tokens.",
    "transformer.h.": "model.layers.",
    "lm_head.ln.": "model.norm.",
    "lm_head.linear.": "lm_head.",
}
PARTS = {".ln.": ".input_layernorm.", ".mixer.Wqkv.": ".self_attn.qkv_proj.", ".mixer.out_proj.": ".self_attn.dense."}


def rename_parts(weights: Iterable[tuple[str, Tensor]], cfg: PhiConfig) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        for old, new in PARTS.items():
            name = name.replace(old, new)
        yield name, tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 80,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "partial_rotary_factor": 0.4,  # as phi-2
    }
    return [
        Architecture(
            "PhiForCausalLM",
            Phi,
            PhiConfig,
            rename=PREFIXES,
            weights=rename_parts,
            ignore=("*.rotary_emb.inv_freq",),
            reference="transformers:PhiForCausalLM",
            tiny=tiny,
        )
    ]
