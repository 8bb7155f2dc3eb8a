"""Phi-3-small: muP scales, a clamped gated GELU, and attention that is block sparse in every other layer or more.

Sparse layers see keys in blocks: the last few, and of older ones every n-th, other ones for each head. The cache is the
ordinary one. A step is laid out anew for the attention kernel: a sequence of it is one head of one block of queries,
whose table lists just the blocks that it sees. So nothing is computed that is thrown away, and keys lie there once.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.kernels import attention as kernel
from modelport.kernels import kv_cache
from modelport.modeling import (
    Attention,
    CacheSpec,
    CausalLM,
    ColumnLinear,
    LayerNorm,
    LMHead,
    QKVLinear,
    Rope,
    RowLinear,
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


@dataclass(frozen=True)
class Layout:
    """A step as the kernel is to see it; a lane is one head of the queries that lie in one block of one sequence.

    :ivar rows: (tokens, heads) int64, where the query of a token and head goes; None when they lie there already.
    :ivar table: (lanes, pieces) int32, pieces of the cache that a lane sees, in order.
    :ivar starts: (lanes + 1,) int32, first row of each lane; `lens`: (lanes,) int32, keys of each.
    """

    rows: Tensor | None
    table: Tensor
    starts: Tensor
    lens: Tensor


class Pattern:
    """Who sees what, and the layout of the present step, which all layers share.

    A query in block `b` of `size` positions sees, of the keys up to itself, the blocks later than `b - local`, and the
    blocks `k` for which `k + 1 + offset` is a multiple of `stride`; the offset differs from head to head.
    """

    def __init__(self, cfg: Phi3SmallConfig):
        self.heads, self.kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.size, self.local = cfg.blocksparse_block_size, cfg.blocksparse_num_local_blocks
        self.stride = cfg.blocksparse_vert_stride
        self.shift = 0 if cfg.blocksparse_homo_head_pattern else max(1, self.stride // self.heads)
        self._last: tuple[Batch, int, int, Layout] | None = None

    def pieces(self, cache: Tensor) -> Tensor:
        """The cache (blocks, kv_heads, block_size, dim) as (pieces, 1, slots, dim); a block is a number of pieces."""
        slots = math.gcd(cache.shape[2], self.size)
        return cache.view(-1, 1, slots, cache.shape[3])

    def layout(self, batch: Batch, group: int, block_size: int) -> Layout:
        last = self._last
        if last is None or last[0] is not batch or last[1:3] != (group, block_size):
            self._last = last = (batch, group, block_size, self._layout(batch, group, block_size))
        return last[3]

    def _layout(self, batch: Batch, group: int, block_size: int) -> Layout:
        positions, heads, device = batch.positions, self.heads, batch.positions.device
        row = torch.arange(len(positions), device=device)
        sequence = torch.bucketize(row, batch.query_starts[1:].long(), right=True)
        sequence.clamp_(max=len(batch.seq_lens) - 1)
        if batch.max_query_len == 1:
            first, count, rows = row, torch.ones_like(row), None
        else:
            begins = positions % self.size == 0
            begins[batch.query_starts[:-1].long().clamp(max=len(positions) - 1)] = True
            first = begins.nonzero()[:, 0]
            count = torch.cat((first[1:], first.new_tensor([len(positions)]))) - first
            part = begins.cumsum(0) - 1  # (tokens,)
            head = torch.arange(heads, device=device)
            rows = (heads * first - first)[part, None] + row[:, None] + head * count[part, None]
        last = positions[first] + count - 1  # (parts,), position of the last query
        seen = self._seen(last // self.size, batch.pages[group].block_table.shape[1] * block_size)
        lens = (seen.sum(-1) - 1) * self.size + (last % self.size + 1)[:, None]  # (parts, heads)
        table = self._table(batch.pages[group].block_table, block_size, sequence[first], seen)
        starts = torch.cat((row.new_zeros(1), count.repeat_interleave(heads, output_size=len(first) * heads).cumsum(0)))
        return Layout(rows, table.int(), starts.int(), lens.flatten().int())

    def _seen(self, block: Tensor, keys: int) -> Tensor:
        """block: (parts,) of the queries -> (parts, heads, blocks) bool; `keys` is how many the table has room for."""
        other = torch.arange(-(-keys // self.size), device=block.device)
        offsets = self.shift * torch.arange(self.heads, device=block.device)
        strided = (other + 1 + offsets[:, None]) % self.stride == 0  # (heads, blocks)
        back = block[:, None] - other  # (parts, blocks)
        return (back >= 0)[:, None] & ((back < self.local)[:, None] | strided)

    def _table(self, block_table: Tensor, block_size: int, sequence: Tensor, seen: Tensor) -> Tensor:
        """Numbers of the pieces that are seen, in order, then anything: (parts * heads, pieces) int64."""
        slots = math.gcd(block_size, self.size)
        in_block, in_cell = block_size // slots, self.size // slots  # pieces of a cache block, of a sparse block
        device = seen.device
        kv_head = torch.arange(self.kv_heads, device=device)[:, None, None]
        pieces = (block_table.long()[:, None, :, None] * self.kv_heads + kv_head) * in_block
        pieces = (pieces + torch.arange(in_block, device=device)).flatten(2)  # (seqs, kv_heads, pieces)
        pieces = nn.functional.pad(pieces, (0, seen.shape[2] * in_cell - pieces.shape[2])).unflatten(2, (-1, in_cell))
        order = (~seen).to(torch.int8).argsort(dim=-1, stable=True)  # (parts, heads, blocks)
        mine = torch.arange(self.heads, device=device) // (self.heads // self.kv_heads)
        return pieces[sequence[:, None, None], mine[:, None], order].flatten(2).flatten(0, 1)


class SparseAttention(nn.Module):
    """Attention by a `Pattern`; the interface of `Attention`."""

    def __init__(self, cfg: Phi3SmallConfig, rope: Rope, pattern: Pattern):
        super().__init__()
        self.rope, self.pattern, self.scale = rope, pattern, cfg.score_scale
        self.cache_spec = CacheSpec(cfg.num_key_value_heads, cfg.head_dim)
        self.k_cache: Tensor | None = None
        self.v_cache: Tensor | None = None
        self.group = 0

    def attach(self, k_cache: Tensor, v_cache: Tensor, group: int) -> None:
        """As `Attention.attach`."""
        self.k_cache, self.v_cache, self.group = k_cache, v_cache, group

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """As `Attention.forward`."""
        angles, rows = self.rope.angles(batch)
        slots = batch.pages[self.group].slots
        kv_cache.rope_write(q, k, v, rows, angles, self.rope.interleaved, self.k_cache, self.v_cache, slots)
        step = self.pattern.layout(batch, self.group, self.k_cache.shape[2])
        if step.rows is None:
            lanes = q.flatten(0, 1)
        else:
            lanes = q.new_empty(q.shape[0] * q.shape[1], q.shape[2])
            lanes[step.rows] = q
        out = kernel.paged_attention(
            lanes[:, None],
            self.pattern.pieces(self.k_cache),
            self.pattern.pieces(self.v_cache),
            step.table,
            step.starts,
            step.lens,
            self.scale,
            max_query_len=min(batch.max_query_len, self.pattern.size),
        )
        return out.view(len(q), -1) if step.rows is None else out[:, 0][step.rows].flatten(1)


class SelfAttention(nn.Module):
    def __init__(self, cfg: Phi3SmallConfig, layer: int, pattern: Pattern):
        super().__init__()
        heads, kv_heads, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.query_key_value = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias=True)
        rope = Rope(size, cfg.rope())
        if cfg.is_dense(layer):
            self.attn = Attention(heads, kv_heads, size, rope=rope, scale=cfg.score_scale)
        else:
            self.attn = SparseAttention(cfg, rope, pattern)
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
    def __init__(self, cfg: Phi3SmallConfig, layer: int, pattern: Pattern):
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
        pattern, norm = Pattern(cfg), LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        scale = cfg.mup_embedding_multiplier or 1.0
        super().__init__(cfg, lambda cfg, layer: Block(cfg, layer, pattern), norm, embed_scale=scale)
        self.lm_head = Head(cfg, self.model.embed_tokens if cfg.tie_word_embeddings else None)


def sort_rows(weights: Iterable[tuple[str, Tensor]], cfg: Phi3SmallConfig) -> Iterator[tuple[str, Tensor]]:
    """Stored head group by head group [queries, key, value], and row by row gate and linear in turn."""
    for name, tensor in weights:
        if ".query_key_value." in name:
            rows = tensor.unflatten(0, (cfg.num_key_value_heads, -1, cfg.head_dim))
            parts = rows.split((rows.shape[1] - 2, 1, 1), dim=1)
            tensor = torch.cat([part.flatten(0, 2) for part in parts])
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
