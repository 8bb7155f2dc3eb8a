"""Jais: GPT-2's shape with linear position biases, a gated feed-forward layer, and scales from muP.

The 13B models and the later family spell their scales differently; both forms are read.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import (
    MLP,
    Alibi,
    Attention,
    Embedding,
    GatedMLP,
    LayerNorm,
    LearnedPositions,
    LMHead,
    QKVLinear,
    RowLinear,
)
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class JaisConfig(TextConfig):
    aliases = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
        "embeddings_scale": "mup_embeddings_scale",
        "scale_qk_dot_by_d": "mup_scale_qk_dot_by_d",
    }
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = True
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    position_embedding_type: str = "learned"
    alibi_scaling: dict[str, float | str | None] | None = None
    mup_embeddings_scale: float = 1.0
    mup_output_alpha: float = 1.0
    mup_scale_qk_dot_by_d: bool = False
    mup_width_scale: float = 1.0
    width_scale: float | None = None  # of the 13B models: the factor on logits, alone

    @model_validator(mode="before")
    @classmethod
    def _known_scaling(cls, data: Any) -> Any:
        scaling, length = data.get("alibi_scaling"), data.get("max_position_embeddings", data.get("n_positions", 1024))
        if scaling and not scaling.get("factor") and length > scaling.get("train_seq_len", 0):
            raise ValueError(
                f"alibi_scaling={scaling!r} changes the biases with the length of a sequence, which cannot be run; "
                f"give it a fixed 'factor', or n_positions={length} no more than its 'train_seq_len'"
            )
        return data

    @property
    def logit_scale(self) -> float:
        return self.mup_output_alpha * self.mup_width_scale if self.width_scale is None else self.width_scale

    def score_scale(self, layer: int) -> float:
        power = -1.0 if self.mup_scale_qk_dot_by_d else -0.5
        scale = self.head_dim**power if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def alibi(self) -> Alibi | None:
        if self.position_embedding_type != "alibi":
            return None
        factor = (self.alibi_scaling or {}).get("factor") or 1.0
        return Alibi(self.num_attention_heads, scale=1.0 / float(factor))


class SelfAttention(nn.Module):
    def __init__(self, cfg: JaisConfig, layer: int):
        super().__init__()
        heads, size = cfg.num_attention_heads, cfg.head_dim
        self.c_attn = QKVLinear(cfg.hidden_size, heads, heads, size, bias=True)
        self.attn = Attention(heads, heads, size, alibi=cfg.alibi(), scale=cfg.score_scale(layer))
        self.c_proj = RowLinear(cfg.hidden_size, cfg.hidden_size, bias=True)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.c_proj(self.attn(*self.c_attn(x), batch), residual)


def feed_forward(cfg: JaisConfig) -> nn.Module:
    size, wide = cfg.hidden_size, cfg.intermediate_size or 4 * cfg.hidden_size
    if cfg.hidden_act == "swiglu":
        return GatedMLP(size, wide, "silu", bias=True, names=("c_fc2", "c_fc", "c_proj"))
    return MLP(size, wide, cfg.hidden_act, bias=True, names=("c_fc", "c_proj"))


class Block(nn.Module):
    def __init__(self, cfg: JaisConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.attn = SelfAttention(cfg, layer)
        self.ln_2 = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.mlp = feed_forward(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.attn(self.ln_1(x), batch, residual=x)
        return self.mlp(self.ln_2(x), residual=x)


class ScaledPositions(LearnedPositions):
    """The embeddings' scale multiplies the positions' rows as well."""

    def __init__(self, cfg: JaisConfig):
        super().__init__(cfg.max_position_embeddings, cfg.hidden_size)
        self.scale = cfg.mup_embeddings_scale

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return x + self.scale * nn.functional.embedding(batch.positions, self.weight)


class Jais(nn.Module):
    def __init__(self, cfg: JaisConfig):
        super().__init__()
        self.wte = Embedding(cfg.vocab_size, cfg.hidden_size, cfg.mup_embeddings_scale)
        self.wpe = None if cfg.position_embedding_type == "alibi" else ScaledPositions(cfg)
        self.h = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_hidden_layers))
        self.ln_f = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        tied = self.wte if cfg.tie_word_embeddings else None
        self.lm_head = LMHead(cfg.hidden_size, cfg.vocab_size, tied=tied, scale=cfg.logit_scale)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.wte(token_ids)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.h] if self.wpe is None else [self.wpe, *self.h]

    def finish(self, state: Tensor) -> Tensor:
        return self.ln_f(state)


def transpose(weights: Iterable[tuple[str, Tensor]], cfg: JaisConfig) -> Iterator[tuple[str, Tensor]]:
    """Conv1D keeps (in, out); our linears keep (out, in)."""
    for name, tensor in weights:
        yield name, tensor.t() if name.startswith("h.") and tensor.dim() == 2 else tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "n_embd": 80,
        "n_layer": 3,
        "n_head": 5,
        "n_inner": 112,
        "n_positions": 512,
        "activation_function": "swiglu",
        "position_embedding_type": "alibi",
        "mup_embeddings_scale": 9.0,
        "mup_output_alpha": 1.5,
        "mup_width_scale": 0.5,
        "mup_scale_qk_dot_by_d": True,
    }
    return [
        Architecture(
            "JAISLMHeadModel",
            Jais,
            JaisConfig,
            rename={"transformer.": ""},
            weights=transpose,
            ignore=("relative_pe.slopes", "h.*.attn.bias", "h.*.attn.masked_bias"),
            tiny=tiny,
        )
    ]
