"""OLMo: Llama's shape with LayerNorms that have no weights, and queries, keys and values that may be clipped.

Checkpoints exist in two layouts: transformers' (OlmoForCausalLM), and AI2's own (OLMoForCausalLM), where a layer's
`ff_proj` is the up projection over the gate.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, LayerNorm, QKVLinear, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class OlmoConfig(TextConfig):
    aliases = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "max_sequence_length": "max_position_embeddings",
        "weight_tying": "tie_word_embeddings",
    }
    attention_bias: bool = False
    clip_qkv: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _own_layout(cls, data: Any) -> Any:
        """AI2 counts gate and up projection as one, and rounds the number of embeddings up."""
        if "d_model" not in data:
            return data
        wide = data.get("mlp_hidden_size") or data.get("mlp_ratio", 4) * data["d_model"]
        return {
            **data,
            "intermediate_size": wide // 2,
            "vocab_size": data.get("embedding_size") or data["vocab_size"],
        }


def norm(cfg: OlmoConfig) -> LayerNorm:
    return LayerNorm(cfg.hidden_size, 1e-5, bias=False, weight=False)


class SelfAttention(nn.Module):
    def __init__(self, cfg: OlmoConfig):
        super().__init__()
        heads, kv_heads, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.attention_bias
        self.clip = cfg.clip_qkv
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=Rope(cfg.head_dim, cfg.rope_parameters))
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        qkv = self.qkv_proj(x)
        if self.clip is not None:
            for part in qkv:
                part.clamp_(-self.clip, self.clip)
        return self.o_proj(self.attn(*qkv, batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: OlmoConfig, layer: int):
        super().__init__()
        self.input_layernorm = norm(cfg)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = norm(cfg)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Olmo(CausalLM):
    def __init__(self, cfg: OlmoConfig):
        super().__init__(cfg, Block, norm(cfg))


PREFIXES = {
    "model.transformer.wte.": "model.embed_tokens.",
    "model.transformer.blocks.": "model.layers.",
    "model.transformer.ff_out.": "lm_head.",
}
PARTS = {".att_proj.": ".self_attn.qkv_proj.", ".attn_out.": ".self_attn.o_proj.", ".ff_out.": ".mlp.down_proj."}


def split_up_gate(weights: Iterable[tuple[str, Tensor]], cfg: OlmoConfig) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        for old, new in PARTS.items():
            name = name.replace(old, new)
        if ".ff_proj." in name:
            up, gate = tensor.chunk(2)
            yield name.replace("ff_proj", "mlp.up_proj"), up
            yield name.replace("ff_proj", "mlp.gate_proj"), gate
        else:
            yield name, tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "clip_qkv": 0.7,
    }
    return [
        Architecture(
            name,
            Olmo,
            OlmoConfig,
            rename=PREFIXES,
            weights=split_up_gate,
            ignore=("*.rotary_emb.inv_freq",),
            reference="transformers:OlmoForCausalLM",
            tiny=tiny,
        )
        for name in ("OlmoForCausalLM", "OLMoForCausalLM")
    ]
