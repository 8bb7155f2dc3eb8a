"""GPT-2: learned positions, LayerNorm before attention and MLP, fused weights stored transposed (Conv1D)."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import (
    Activation,
    Attention,
    ColumnLinear,
    Embedding,
    LayerNorm,
    LearnedPositions,
    LMHead,
    QKVLinear,
    RowLinear,
)
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class GPT2Config(TextConfig):
    aliases = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
    }
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = True
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def scale(self, layer: int) -> float:
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


class SelfAttention(nn.Module):
    def __init__(self, cfg: GPT2Config, layer: int):
        super().__init__()
        heads = cfg.num_attention_heads
        self.c_attn = QKVLinear(cfg.hidden_size, heads, heads, cfg.head_dim, bias=True)
        self.attn = Attention(heads, heads, cfg.head_dim, scale=cfg.scale(layer))
        self.c_proj = RowLinear(cfg.hidden_size, cfg.hidden_size, bias=True)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.c_proj(self.attn(*self.c_attn(x), batch), residual)


class MLP(nn.Module):
    def __init__(self, cfg: GPT2Config):
        super().__init__()
        wide = cfg.intermediate_size or 4 * cfg.hidden_size
        self.c_fc = ColumnLinear(cfg.hidden_size, wide, bias=True)
        self.act = Activation(cfg.hidden_act)
        self.c_proj = RowLinear(wide, cfg.hidden_size, bias=True)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)), residual)


class Block(nn.Module):
    def __init__(self, cfg: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.attn = SelfAttention(cfg, layer)
        self.ln_2 = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.attn(self.ln_1(x), batch, residual=x)
        return self.mlp(self.ln_2(x), residual=x)


class GPT2(nn.Module):
    def __init__(self, cfg: GPT2Config):
        super().__init__()
        self.wte = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.wpe = LearnedPositions(cfg.max_position_embeddings, cfg.hidden_size)
        self.h = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_hidden_layers))
        self.ln_f = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.lm_head = LMHead(cfg.hidden_size, cfg.vocab_size, tied=self.wte if cfg.tie_word_embeddings else None)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.wte(token_ids)

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.wpe, *self.h]

    def finish(self, state: Tensor) -> Tensor:
        return self.ln_f(state)


def transpose(weights: Iterable[tuple[str, Tensor]], cfg: GPT2Config) -> Iterator[tuple[str, Tensor]]:
    """Conv1D keeps (in, out); our linears keep (out, in)."""
    for name, tensor in weights:
        yield name, tensor.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "scale_attn_by_inverse_layer_idx": True,
    }
    return [
        Architecture(
            "GPT2LMHeadModel",
            GPT2,
            GPT2Config,
            rename={"transformer.": ""},  # published with and without it
            weights=transpose,
            ignore=("h.*.attn.bias", "h.*.attn.masked_bias"),  # stored causal masks
            reference="transformers:GPT2LMHeadModel",
            tiny=tiny,
            variants={
                "plain": {"scale_attn_by_inverse_layer_idx": False, "n_inner": 96},
                "unscaled": {"scale_attn_weights": False, "activation_function": "relu", "tie_word_embeddings": False},
            },
        )
    ]
