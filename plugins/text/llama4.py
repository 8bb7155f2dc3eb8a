"""Llama 4's language model: three layers with rotary positions that see their own chunk only, then one with neither.

The layers without rotary positions see everything, and sharpen their queries step by step as positions grow. An
expert's share scales what goes into the expert, not what comes out of it. Text only: checkpoints with a vision tower
name another architecture; small dense models (MobileLLM-R1) are published under this one.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import (
    Attention,
    CausalLM,
    Chunks,
    Experts,
    GatedMLP,
    QKVLinear,
    RMSNorm,
    Rope,
    Router,
    RowLinear,
)
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class Llama4Config(TextConfig):
    head_dim: int = 128
    intermediate_size: int = 8192  # of an expert, and of the shared one
    intermediate_size_mlp: int = 16384  # of layers without experts
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(rope_theta=500000.0)
    attention_bias: bool = False
    attention_chunk_size: int | None = 8192
    layer_types: list[str] | None = None
    no_rope_layers: list[int] = []  # 0 where a layer has no rotary positions; not the other way around
    no_rope_layer_interval: int = 4
    use_qk_norm: bool = True
    attn_temperature_tuning: bool = True
    floor_scale: float = 8192.0
    attn_scale: float = 0.1
    moe_layers: list[int] | None = None
    interleave_moe_layer_step: int = 1
    num_local_experts: int = 16
    num_experts_per_tok: int = 1

    @field_validator("attn_temperature_tuning", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return value if isinstance(value, str) else bool(value)  # the first checkpoints say 4

    def turns(self, layer: int) -> bool:
        """Whether the layer has rotary positions."""
        if self.no_rope_layers:
            return bool(self.no_rope_layers[layer])
        return (layer + 1) % self.no_rope_layer_interval != 0

    def is_chunked(self, layer: int) -> bool:
        if self.attention_chunk_size is None:
            return False
        return self.layer_types[layer] == "chunked_attention" if self.layer_types else self.turns(layer)

    def is_sparse(self, layer: int) -> bool:
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return self.interleave_moe_layer_step > 0 and (layer + 1) % self.interleave_moe_layer_step == 0


class Temperature(nn.Module):
    """`q * (1 + attn_scale * log(1 + floor((position + 1) / floor_scale)))` (arXiv:2501.19399); q: (tokens, heads,
    head_dim)."""

    def __init__(self, cfg: Llama4Config):
        super().__init__()
        self.floor_scale, self.attn_scale, self.factors = cfg.floor_scale, cfg.attn_scale, None

    def build_tables(self, device: torch.device, max_len: int) -> None:
        steps = torch.floor(torch.arange(1, max_len + 1, device=device) / self.floor_scale)
        self.factors = 1.0 + self.attn_scale * torch.log1p(steps) if max_len >= self.floor_scale else None

    def forward(self, q: Tensor, batch: Batch) -> Tensor:
        return q if self.factors is None else (q * self.factors[batch.positions, None, None]).to(q.dtype)


class SelfAttention(nn.Module):
    def __init__(self, cfg: Llama4Config, layer: int, chunks: Chunks | None, temperature: Temperature):
        super().__init__()
        heads, kv_heads, size, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.attention_bias
        turns = cfg.turns(layer)
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias)
        # The authors normalise what they have turned, which is the same: turning keeps lengths, and there is no weight.
        self.qk_norm = RMSNorm(size, cfg.rms_norm_eps, weight=False) if cfg.use_qk_norm and turns else None
        self.temperature = temperature if cfg.attn_temperature_tuning and not turns else None
        self.attn = Attention(
            heads,
            kv_heads,
            size,
            rope=Rope(size, cfg.rope_parameters, interleaved=True) if turns else None,
            chunks=chunks if cfg.is_chunked(layer) else None,
        )
        self.o_proj = RowLinear(heads * size, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q), self.qk_norm(k)
        if self.temperature is not None:
            q = self.temperature(q, batch)
        return self.o_proj(self.attn(q, k, v, batch), residual)


class SparseMoe(nn.Module):
    def __init__(self, cfg: Llama4Config):
        super().__init__()
        self.router = Router(cfg.hidden_size, cfg.num_local_experts, cfg.num_experts_per_tok, scores="sigmoid")
        self.experts = Experts(cfg.num_local_experts, cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)
        self.shared_expert = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        shares, ids = self.router(x)
        rows = (x[:, None] * shares[..., None].to(x.dtype)).flatten(0, 1)  # (tokens * top_k, hidden_size)
        routed = self.experts(rows, torch.ones_like(shares).view(-1, 1), ids.view(-1, 1))
        return self.shared_expert(x, residual) + routed.view(*ids.shape, -1).sum(1)


class Block(nn.Module):
    def __init__(self, cfg: Llama4Config, layer: int, chunks: Chunks | None, temperature: Temperature):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg, layer, chunks, temperature)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        dense = not cfg.is_sparse(layer)
        wide = cfg.intermediate_size_mlp
        self.feed_forward = GatedMLP(cfg.hidden_size, wide, cfg.hidden_act) if dense else SparseMoe(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.feed_forward(self.post_attention_layernorm(x), residual=x)


class Llama4(CausalLM):
    def __init__(self, cfg: Llama4Config):
        chunks = Chunks(cfg.attention_chunk_size) if cfg.attention_chunk_size is not None else None
        temperature = Temperature(cfg)
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        super().__init__(cfg, lambda cfg, layer: Block(cfg, layer, chunks, temperature), norm)


def transposed(weights: Iterable[tuple[str, Tensor]], cfg: Llama4Config) -> Iterator[tuple[str, Tensor]]:
    """The experts lie in one tensor (experts, in_features, out_features), or each by itself, as any linear."""
    for name, tensor in weights:
        fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        yield name, tensor.transpose(1, 2) if fused else tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 48,
        "intermediate_size_mlp": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "attention_chunk_size": 24,
        "floor_scale": 8,
        "num_local_experts": 8,
        "interleave_moe_layer_step": 2,
    }
    scaled = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    variants = {
        # as the models of 16 experts write it
        "scout": {
            "interleave_moe_layer_step": 1,
            "attn_temperature_tuning": True,
            "rope_theta": 500000.0,
            "rope_scaling": {**scaled, "original_max_position_embeddings": 64},
            "no_rope_layers": [],
        },
        # of 128 experts
        "maverick": {"use_qk_norm": False, "rope_scaling": None, "moe_layers": [1, 3], "num_local_experts": 16},
        # MobileLLM-R1
        "dense": {
            "moe_layers": [],
            "interleave_moe_layer_step": 0,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "no_rope_layers": [1, 1, 1, 0],
            "attn_temperature_tuning": False,
            "tie_word_embeddings": True,
        },
        "flags": {
            "attention_bias": True,
            "num_experts_per_tok": 3,
            "attention_chunk_size": 40,
            "no_rope_layers": [1, 0, 0, 1],
            "layer_types": ["full_attention", "chunked_attention", "full_attention", "chunked_attention"],
        },
        "unchunked": {"attention_chunk_size": None, "no_rope_layer_interval": 2},
    }
    return [
        Architecture(
            "Llama4ForCausalLM",
            Llama4,
            Llama4Config,
            weights=transposed,
            reference="transformers:Llama4ForCausalLM",
            tiny=tiny,
            variants=variants,
            model_type="llama4_text",
        )
    ]
