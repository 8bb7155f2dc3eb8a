"""MiniCPM: Llama's shape with scaled embeddings, residuals and logits, dense or with eight experts.

MiniCPM4's two sets of rotary factors are not chosen by the length of a sequence: its authors take the long one whenever
the model's context is longer than the original one.
"""

from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, Experts, GatedMLP, QKVLinear, RMSNorm, Rope, Router, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class MiniCPMConfig(TextConfig):
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    scale_emb: float = 1.0
    scale_depth: float = 1.0
    dim_model_base: float = 1.0
    num_experts: int = 0
    num_experts_per_tok: int = 2
    hidden_act_param: float = 0.0  # threshold of "fatrelu" (MiniCPM-S)

    @model_validator(mode="before")
    @classmethod
    def _one_set_of_factors(cls, data: Any) -> Any:
        for key in ("rope_parameters", "rope_scaling"):
            rope = data.get(key) or {}
            original = rope.get("original_max_position_embeddings")
            if original and "long_factor" in rope and data.get("max_position_embeddings", 2048) > original:
                data = {**data, key: {**rope, "short_factor": rope["long_factor"]}}
        return data

    @property
    def residual_scale(self) -> float:
        return self.scale_depth / self.num_hidden_layers**0.5


class SelfAttention(nn.Module):
    def __init__(self, cfg: MiniCPMConfig):
        super().__init__()
        heads, kv_heads, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=Rope(cfg.head_dim, cfg.rope_parameters))
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch))


class FatReLU(nn.Module):
    """`gate * up` where the gate is above `threshold`, else 0 (Song et al., 2024, arXiv:2402.13516).

    x: (tokens, 2 * width) = [gate | up] -> (tokens, width).
    """

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.threshold(gate, self.threshold, 0.0) * up


class SparseMoe(nn.Module):
    def __init__(self, cfg: MiniCPMConfig):
        super().__init__()
        self.gate = Router(cfg.hidden_size, cfg.num_experts, cfg.num_experts_per_tok, normalize=1)
        names = ("w1", "w3", "w2")
        self.experts = Experts(cfg.num_experts, cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, names=names)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.gate(x))


def feed_forward(cfg: MiniCPMConfig) -> nn.Module:
    if cfg.num_experts:
        return SparseMoe(cfg)
    if cfg.hidden_act != "fatrelu":
        return GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)
    mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, "relu")
    mlp.act = FatReLU(cfg.hidden_act_param)
    return mlp


class Block(nn.Module):
    def __init__(self, cfg: MiniCPMConfig, layer: int):
        super().__init__()
        self.scale = cfg.residual_scale
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = feed_forward(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = x + self.scale * self.self_attn(self.input_layernorm(x), batch)
        return x + self.scale * self.mlp(self.post_attention_layernorm(x))


class MiniCPM(CausalLM):
    def __init__(self, cfg: MiniCPMConfig):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        super().__init__(cfg, Block, norm, embed_scale=cfg.scale_emb, logit_scale=cfg.dim_model_base / cfg.hidden_size)


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
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 32,
    }
    return [Architecture("MiniCPMForCausalLM", MiniCPM, MiniCPMConfig, ignore=("*.rotary_emb.inv_freq",), tiny=tiny)]
