"""DeepSeek-V2 and V3: latent attention, and mixtures of experts some of which serve every token (arXiv 2405.04434)."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import CausalLM, Experts, GatedMLP, LatentAttention, RMSNorm, Rope, Router
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class DeepseekV2Config(TextConfig):
    attention_bias: bool = False
    mlp_bias: bool = False  # of dense and shared ones; V3 has none
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleave: bool = True
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_routed_experts: int | None = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 1407
    n_group: int | None = None
    topk_group: int | None = None
    topk_method: str = "greedy"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    def is_sparse(self, layer: int) -> bool:
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    def router(self) -> dict[str, Any]:
        # V2's authors scale shares or normalise them, never both.
        normalizes = self.norm_topk_prob and self.num_experts_per_tok > 1
        scale, normalize = (1.0, 1.0) if normalizes else (self.routed_scaling_factor, None)
        if self.topk_method == "greedy":
            return {"scale": scale, "normalize": normalize}
        groups = {"groups": self.n_group or 1, "top_groups": self.topk_group or 1}
        return {"scale": scale, "normalize": normalize, **groups}


class DeepseekV3Config(DeepseekV2Config):
    first_k_dense_replace: int = 3
    n_routed_experts: int | None = 256
    n_shared_experts: int | None = 1
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 2048
    n_group: int | None = 8
    topk_group: int | None = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5

    def router(self) -> dict[str, Any]:
        return {
            "scores": "sigmoid",
            "correction": True,
            "normalize": 1.0 if self.norm_topk_prob else None,
            "scale": self.routed_scaling_factor,
            "groups": self.n_group or 1,
            "top_groups": self.topk_group or 1,
            "group_best": 2,
        }


def attention_scale(head_dim: int, rope: RopeParameters) -> float:
    """1 / sqrt(head_dim), times the square of what YaRN makes of `mscale_all_dim` (the authors' modeling code)."""
    if rope.rope_type == "default" or not rope.mscale_all_dim or (rope.factor or 1.0) <= 1:
        return head_dim**-0.5
    return head_dim**-0.5 * (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def attention(cfg: DeepseekV2Config) -> LatentAttention:
    return LatentAttention(
        cfg.hidden_size,
        cfg.num_attention_heads,
        q_lora_rank=cfg.q_lora_rank,
        kv_lora_rank=cfg.kv_lora_rank,
        qk_nope_head_dim=cfg.qk_nope_head_dim,
        qk_rope_head_dim=cfg.qk_rope_head_dim,
        v_head_dim=cfg.v_head_dim,
        rope=Rope(cfg.qk_rope_head_dim, cfg.rope_parameters, interleaved=cfg.rope_interleave),
        scale=attention_scale(cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.rope_parameters),
        bias=cfg.attention_bias,
    )


class SparseMoe(nn.Module):
    def __init__(self, cfg: DeepseekV2Config):
        super().__init__()
        hidden, count, wide = cfg.hidden_size, cfg.n_routed_experts, cfg.moe_intermediate_size
        self.gate = Router(hidden, count, cfg.num_experts_per_tok, exact=True, **cfg.router())
        self.experts = Experts(count, hidden, wide, cfg.hidden_act)
        self.shared_experts = (
            GatedMLP(hidden, wide * cfg.n_shared_experts, cfg.hidden_act, cfg.mlp_bias)
            if cfg.n_shared_experts
            else None
        )

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.shared_experts is not None:
            residual = self.shared_experts(x, residual)
        return self.experts(x, *self.gate(x), residual)


class Block(nn.Module):
    def __init__(self, cfg: DeepseekV2Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        dense = not cfg.is_sparse(layer)
        self.mlp = (
            GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias) if dense else SparseMoe(cfg)
        )

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class DeepseekV2(CausalLM):
    def __init__(self, cfg: DeepseekV2Config):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


def weights(stream: Iterable[tuple[str, Tensor]], cfg: DeepseekV2Config) -> Iterator[tuple[str, Tensor]]:
    """V3's extra layers, which predict several tokens at once, lie behind the last one and are not needed."""
    for name, tensor in stream:
        parts = name.split(".")
        if parts[:2] != ["model", "layers"] or int(parts[2]) < cfg.num_hidden_layers:
            yield name, tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "routed_scaling_factor": 1.5,
        "n_group": 4,
        "topk_group": 2,
    }
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    variants = {
        "plain_queries": {"q_lora_rank": None},
        "yarn": {
            "rope_parameters": {**yarn, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.7}
        },
        "biases": {"attention_bias": True},
        "all_sparse": {"first_k_dense_replace": 0},
    }
    own = {"biases": {"attention_bias": True, "mlp_bias": True}}
    v2_variants = {**variants, **own, "group_limited": {"topk_method": "group_limited_greedy"}}
    v3_variants = {**variants, "not_normalised": {"norm_topk_prob": False}, "halves": {"rope_interleave": False}}
    v2, v3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
    return [
        Architecture(
            name,
            DeepseekV2,
            config,
            weights=weights,
            ignore=("*.rotary_emb.inv_freq",),
            reference=f"transformers:{name}",
            tiny=tiny,
            variants=flags,
        )
        for name, config, flags in ((v2, DeepseekV2Config, v2_variants), (v3, DeepseekV3Config, v3_variants))
    ]
