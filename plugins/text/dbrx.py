"""DBRX: LayerNorms without biases, clipped queries, keys and values, and many experts whose shares have a p-norm of 1.

Decision: the base of the rotary embedding is the one in `attn_config`, where the authors put and read it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, Experts, LayerNorm, QKVLinear, Rope, Router, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class DbrxConfig(TextConfig):
    aliases = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "max_seq_len": "max_position_embeddings",
        "kv_n_heads": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
    }
    intermediate_size: int = 3584
    clip_qkv: float | None = None
    moe_num_experts: int = 4
    moe_top_k: int = 1
    moe_normalize_expert_weights: float | None = 1.0

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: Any) -> Any:
        """Settings of attention and experts stand in groups of their own."""
        attention, experts = (data.get(key) or {} for key in ("attn_config", "ffn_config"))
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        if "rope_theta" in attention:
            rope = {**rope, "rope_theta": attention["rope_theta"]}
        act = (experts.get("ffn_act_fn") or {}).get("name", "silu")
        read = {key: experts[key] for key in experts if key.startswith("moe_") or key == "ffn_hidden_size"}
        read |= {key: attention[key] for key in ("kv_n_heads", "clip_qkv") if key in attention}
        return {"kv_n_heads": 1, **data, **read, "hidden_act": act, "rope_parameters": rope}


class SelfAttention(nn.Module):
    def __init__(self, cfg: DbrxConfig):
        super().__init__()
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.clip = cfg.clip_qkv
        self.Wqkv = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=Rope(cfg.head_dim, cfg.rope_parameters))
        self.out_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        qkv = self.Wqkv(x)
        if self.clip is not None:
            for part in qkv:
                part.clamp_(-self.clip, self.clip)
        return self.out_proj(self.attn(*qkv, batch), residual)


class SparseMoe(nn.Module):
    def __init__(self, cfg: DbrxConfig):
        super().__init__()
        count, norm = cfg.moe_num_experts, cfg.moe_normalize_expert_weights
        self.router = Router(cfg.hidden_size, count, cfg.moe_top_k, normalize=norm)
        self.experts = Experts(count, cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, names=("w1", "v1", "w2"))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.experts(x, *self.router(x), residual)


class Block(nn.Module):
    def __init__(self, cfg: DbrxConfig, layer: int):
        super().__init__()
        self.norm_1 = LayerNorm(cfg.hidden_size, bias=False)
        self.attn = SelfAttention(cfg)
        self.norm_2 = LayerNorm(cfg.hidden_size, bias=False)
        self.ffn = SparseMoe(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.attn(self.norm_1(x), batch, residual=x)
        return self.ffn(self.norm_2(x), residual=x)


class Dbrx(CausalLM):
    def __init__(self, cfg: DbrxConfig):
        super().__init__(cfg, Block, LayerNorm(cfg.hidden_size, bias=False))


def by_expert(weights: Iterable[tuple[str, Tensor]], cfg: DbrxConfig) -> Iterator[tuple[str, Tensor]]:
    """The experts' matrices lie one under the other, each (intermediate_size, hidden_size), the last one transposed."""
    for name, tensor in weights:
        name = name.replace(".norm_attn_norm.", ".").replace(".router.layer.", ".router.")
        path, found, part = name.partition(".experts.mlp.")
        if not found:
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor.chunk(cfg.moe_num_experts)):
            yield f"{path}.experts.{expert}.{part}.weight", matrix.T if part == "w2" else matrix


@hookimpl
def register_architectures() -> list[Architecture]:
    attention = {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 10000.0}
    experts = {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 3}
    tiny = {
        "vocab_size": 320,
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "max_seq_len": 512,
        "attn_config": attention,
        "ffn_config": experts,
    }
    variants = {
        "not_normalised": {"ffn_config": {**experts, "moe_normalize_expert_weights": None}},
        "2_norm": {"ffn_config": {**experts, "moe_normalize_expert_weights": 2.0, "ffn_act_fn": {"name": "gelu"}}},
        "more_heads": {"attn_config": {**attention, "kv_n_heads": 4}},
    }
    rename = {
        "transformer.wte.": "model.embed_tokens.",
        "transformer.blocks.": "model.layers.",
        "transformer.norm_f.": "model.norm.",
    }
    name = "DbrxForCausalLM"
    reference = f"transformers:{name}"
    return [Architecture(name, Dbrx, DbrxConfig, rename, by_expert, reference=reference, tiny=tiny, variants=variants)]
