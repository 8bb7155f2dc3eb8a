"""Jamba: Mamba blocks with an attention block now and then, no positions, and experts in every other block."""

import math
from typing import Literal

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import (
    Attention,
    CausalLM,
    Experts,
    GatedMLP,
    MambaMixer,
    QKVLinear,
    RMSNorm,
    Router,
    RowLinear,
)
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class JambaConfig(TextConfig):
    max_position_embeddings: int = 262144
    num_experts: int = 16
    num_experts_per_tok: int = 2
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_dt_rank: int | Literal["auto"] = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False

    @property
    def dt_rank(self) -> int:
        return math.ceil(self.hidden_size / 16) if self.mamba_dt_rank == "auto" else self.mamba_dt_rank

    def attends(self, layer: int) -> bool:
        return layer % self.attn_layer_period == self.attn_layer_offset

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 1 and layer % self.expert_layer_period == self.expert_layer_offset


class SelfAttention(nn.Module):
    def __init__(self, cfg: JambaConfig):
        super().__init__()
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim)
        self.attn = Attention(heads, kv_heads, cfg.head_dim)
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


def mixer(cfg: JambaConfig) -> MambaMixer:
    return MambaMixer(
        cfg.hidden_size,
        cfg.mamba_expand * cfg.hidden_size,
        cfg.mamba_d_state,
        cfg.mamba_d_conv,
        cfg.dt_rank,
        bias=cfg.mamba_proj_bias,
        conv_bias=cfg.mamba_conv_bias,
        norm=lambda size: RMSNorm(size, cfg.rms_norm_eps),
    )


class SparseMoe(nn.Module):
    def __init__(self, cfg: JambaConfig):
        super().__init__()
        self.router = Router(cfg.hidden_size, cfg.num_experts, cfg.num_experts_per_tok)
        self.experts = Experts(cfg.num_experts, cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.experts(x, *self.router(x), residual)


class Block(nn.Module):
    def __init__(self, cfg: JambaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mixer_name = "self_attn" if cfg.attends(layer) else "mamba"
        self.add_module(self.mixer_name, SelfAttention(cfg) if cfg.attends(layer) else mixer(cfg))
        self.pre_ff_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        dense = (cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)
        self.feed_forward = SparseMoe(cfg) if cfg.has_experts(layer) else GatedMLP(*dense)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.get_submodule(self.mixer_name)(self.input_layernorm(x), batch, residual=x)
        return self.feed_forward(self.pre_ff_layernorm(x), residual=x)


class Jamba(CausalLM):
    def __init__(self, cfg: JambaConfig):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "max_position_embeddings": 512,
    }
    return [
        Architecture(
            "JambaForCausalLM",
            Jamba,
            JambaConfig,
            rename={"model.final_layernorm.": "model.norm."},
            reference="transformers:JambaForCausalLM",
            tiny=tiny,
        )
    ]
