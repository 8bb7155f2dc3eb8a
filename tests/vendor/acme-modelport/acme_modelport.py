"""Acme: a Llama-like decoder with learned gates on its residuals, and norms that may be clamped."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, ModelInfo, hookimpl

modelport_api = 1


class AcmeConfig(TextConfig):
    aliases = {"dim": "hidden_size", "ffn_dim": "intermediate_size"}
    norm_clamp: float = 0.0  # largest magnitude that leaves a norm; 0 for no limit


class GatedResidual(nn.Module):
    """`x + tanh(gate) * y`: a branch that training opens feature by feature; gate: (size,)."""

    def __init__(self, size: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + torch.tanh(self.gate) * y


class SelfAttention(nn.Module):
    def __init__(self, cfg: AcmeConfig):
        super().__init__()
        heads, kv_heads, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.wqkv = QKVLinear(cfg.hidden_size, heads, kv_heads, size)
        self.attn = Attention(heads, kv_heads, size, rope=Rope(size, cfg.rope_parameters))
        self.wo = RowLinear(heads * size, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.wqkv(x)  # q: (tokens, heads, head_dim); k, v: (tokens, kv_heads, head_dim)
        return self.wo(self.attn(q, k, v, batch))


class Block(nn.Module):
    def __init__(self, cfg: AcmeConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attention = SelfAttention(cfg)
        self.attention_residual = GatedResidual(cfg.hidden_size)
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.ffn = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)
        self.ffn_residual = GatedResidual(cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.attention_residual(x, self.attention(self.attention_norm(x), batch))
        return self.ffn_residual(x, self.ffn(self.ffn_norm(x)))


class Acme(CausalLM):
    def __init__(self, cfg: AcmeConfig):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


def split_gate_up(weights: Iterable[tuple[str, Tensor]], cfg: AcmeConfig) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's `w13` has the rows of gate and up in turn: gate 0, up 0, gate 1, up 1, ..."""
    for name, tensor in weights:
        if name.endswith(".w13.weight"):
            stem = name.removesuffix("w13.weight")
            yield stem + "gate_proj.weight", tensor[0::2]
            yield stem + "up_proj.weight", tensor[1::2]
        else:
            yield name, tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 96,
        "dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "norm_clamp": 1.5,
    }
    return [
        Architecture(
            "AcmeForCausalLM",
            Acme,
            AcmeConfig,
            rename={"decoder.": "model.", "output.": "lm_head."},
            weights=split_gate_up,
            tiny=tiny,
        )
    ]


class ClampedNorm(nn.Module):
    """A norm whose result stays within +-limit; it takes over the weight, so the checkpoint's name still fits."""

    def __init__(self, norm: RMSNorm, limit: float):
        super().__init__()
        self.weight, self.eps, self.limit = norm.weight, norm.eps, limit

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return x.clamp(-self.limit, self.limit)


@hookimpl
def transform_model(model: nn.Module, info: ModelInfo) -> None:
    if not isinstance(info.config, AcmeConfig) or not info.config.norm_clamp:
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                setattr(module, name, ClampedNorm(child, info.config.norm_clamp))
