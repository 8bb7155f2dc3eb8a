"""Phi-3-small: muP scales, a clamped gated GELU, and attention that is block sparse in every other layer or more."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import (
    Attention,
    BlockPattern,
    BlockSparseAttention,
    CausalLM,
    ColumnLinear,
    LayerNorm,
    LMHead,
    QKVLinear,
    Rope,
    RowLinear,
    ungroup_qkv,
)
from modelport.plugin import Architecture, hookimpl

modelport_api = 1

LOWEST = torch.finfo(torch.float32).min
VOCABULARY = 100352
# What the published tokenizer has no token for; early configurations leave the list to it.
DUMMIES = [100256, *range(100258, 100261), 100264, 100265, *range(100267, VOCABULARY)]


class Phi3SmallConfig(TextConfig):
    aliases = {"rope_embedding_base": "rope_theta", "ff_intermediate_size": "intermediate_size"}
    max_position_embeddings: int = 8192
    num_key_value_heads: int = 8
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters = RopeParameters(rope_theta=1e6)
    rope_position_scale: float = 1.0
    layer_norm_epsilon: float = 1e-5
    gegelu_limit: float | None = 20.0
    ff_dim_multiplier: float | None = None
    gegelu_pad_to_256: bool = True
    blocksparse_homo_head_pattern: bool = False
    blocksparse_block_size: int = 64
    blocksparse_num_local_blocks: int = 16
    blocksparse_vert_stride: int = 8
    dense_attention_every_n_layers: int | None = 2
    mup_use_scaling: bool = True
    mup_width_multiplier: float | None = 8.0
    mup_embedding_multiplier: float | None = 10.0
    mup_attn_multiplier: float = 1.0
    dummy_token_indices: list[int] | None = None

    def is_dense(self, layer: int) -> bool:
        every = self.dense_attention_every_n_layers
        return every is not None and (layer + 1) % every == 0

    @property
    def head_shift(self) -> int:
        """By how many blocks each head's strided blocks lie before those of the head below it."""
        stride = self.blocksparse_vert_stride
        return 0 if self.blocksparse_homo_head_pattern else max(1, stride // self.num_attention_heads)

    @property
    def dummies(self) -> list[int]:
        """Vocabulary entries that are never chosen."""
        if self.dummy_token_indices is None:
            return DUMMIES if self.vocab_size == VOCABULARY else []
        return self.dummy_token_indices

    @property
    def score_scale(self) -> float:
        return self.mup_attn_multiplier / self.head_dim if self.mup_use_scaling else self.head_dim**-0.5

    @property
    def width(self) -> int:
        if self.intermediate_size:
            return self.intermediate_size
        if not self.ff_dim_multiplier:
            raise ValueError("config.json has neither ff_intermediate_size nor ff_dim_multiplier; give one of them")
        wide = int(self.ff_dim_multiplier * (self.hidden_size // 3) * 2)
        return -(-wide // 256) * 256 if self.gegelu_pad_to_256 else wide

    def rope(self, layer_type: str = "") -> RopeParameters:
        plain = self.rope_parameters
        if self.rope_position_scale == 1.0 or plain.rope_type != "default":
            return plain
        return plain.model_copy(update={"rope_type": "linear", "factor": self.rope_position_scale})


class SelfAttention(nn.Module):
    def __init__(self, cfg: Phi3SmallConfig, layer: int, pattern: BlockPattern):
        super().__init__()
        heads, kv_heads, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.query_key_value = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias=True)
        rope = Rope(size, cfg.rope())
        if cfg.is_dense(layer):
            self.attn = Attention(heads, kv_heads, size, rope=rope, scale=cfg.score_scale)
        else:
            self.attn = BlockSparseAttention(size, pattern, rope=rope, scale=cfg.score_scale)
        self.dense = RowLinear(heads * size, cfg.hidden_size, bias=True)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.dense(self.attn(*self.query_key_value(x), batch), residual)


class MLP(nn.Module):
    """Up gives [gate | linear]; `gate * sigmoid(1.702 * gate) * (linear + 1)`, both clamped, goes down."""

    def __init__(self, cfg: Phi3SmallConfig):
        super().__init__()
        self.limit = math.inf if cfg.gegelu_limit is None else cfg.gegelu_limit
        self.up_proj = ColumnLinear(cfg.hidden_size, 2 * cfg.width, bias=True)
        self.down_proj = RowLinear(cfg.width, cfg.hidden_size, bias=True)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        gate, linear = self.up_proj(x).chunk(2, dim=-1)
        gate, linear = gate.clamp(max=self.limit), linear.clamp(-self.limit, self.limit)
        return self.down_proj(gate * torch.sigmoid(1.702 * gate) * (linear + 1), residual)


class Block(nn.Module):
    def __init__(self, cfg: Phi3SmallConfig, layer: int, pattern: BlockPattern):
        super().__init__()
        self.input_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.self_attn = SelfAttention(cfg, layer, pattern)
        self.post_attention_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Head(LMHead):
    """Rows of the vocabulary that stand for no token are never chosen."""

    def __init__(self, cfg: Phi3SmallConfig, tied: nn.Module | None):
        scale = 1.0 / (cfg.mup_width_multiplier or 1.0)
        super().__init__(cfg.hidden_size, cfg.vocab_size, tied=tied, scale=scale)
        self.dummies, self._dummies = cfg.dummies, None

    def build_tables(self, device: torch.device, max_len: int) -> None:
        self._dummies = torch.tensor(self.dummies, dtype=torch.int64, device=device)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.float().index_fill(-1, self._dummies, LOWEST) if self.dummies else logits


class Phi3Small(CausalLM):
    def __init__(self, cfg: Phi3SmallConfig):
        pattern = BlockPattern(
            cfg.num_attention_heads,
            cfg.num_key_value_heads,
            cfg.blocksparse_block_size,
            cfg.blocksparse_num_local_blocks,
            cfg.blocksparse_vert_stride,
            cfg.head_shift,
        )
        norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        scale = cfg.mup_embedding_multiplier or 1.0
        super().__init__(cfg, lambda cfg, layer: Block(cfg, layer, pattern), norm, embed_scale=scale)
        self.lm_head = Head(cfg, self.model.embed_tokens if cfg.tie_word_embeddings else None)


def sort_rows(weights: Iterable[tuple[str, Tensor]], cfg: Phi3SmallConfig) -> Iterator[tuple[str, Tensor]]:
    """Stored head group by head group [queries, key, value], and row by row gate and linear in turn."""
    for name, tensor in weights:
        if ".query_key_value." in name:
            tensor = ungroup_qkv(tensor, cfg.num_key_value_heads, cfg.head_dim)
        elif ".up_proj." in name:
            tensor = torch.cat((tensor[::2], tensor[1::2]))
        yield name, tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "ff_intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "blocksparse_block_size": 16,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 3,
        "gegelu_limit": 3.0,
        "dummy_token_indices": [300, 319],
    }
    return [
        Architecture(
            "Phi3SmallForCausalLM",
            Phi3Small,
            Phi3SmallConfig,
            rename={"model.final_layernorm.": "model.norm."},
            weights=sort_rows,
            ignore=("*.rotary_emb.inv_freq",),
            tiny=tiny,
        )
    ]
