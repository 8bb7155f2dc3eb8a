"""Attention to a pattern of blocks (Child et al., 2019): the nearest ones, and of older ones every n-th.

Decisions: the cache is the ordinary one, since heads differ in the blocks that they see and together see all. A step is
laid out anew for the attention kernel: a sequence of it is one head of the queries in one block, whose table lists just
the blocks that it sees. So nothing is computed that is thrown away, no mask exists, and keys lie in memory once.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.kernels import attention as kernel
from modelport.kernels import kv_cache
from modelport.modeling.cache import CacheSpec
from modelport.modeling.chunks import runs
from modelport.modeling.rope import Rope


@dataclass(frozen=True)
class _Layout:
    """A step as the kernel is to see it; a lane is one head of the queries that lie in one block of one sequence.

    :ivar rows: (tokens, heads) int64, where the query of a token and head goes; None when they lie there already.
    :ivar table: (lanes, pieces) int32, pieces of the cache that a lane sees, in order.
    :ivar starts: (lanes + 1,) int32, first row of each lane; `lens`: (lanes,) int32, keys of each.
    """

    rows: Tensor | None
    table: Tensor
    starts: Tensor
    lens: Tensor


class BlockPattern:
    """Who sees what, and the layout of the present step; layers of one pattern share it.

    A query in block `b` sees, of the keys up to itself, the blocks after `b - local_blocks`, and each block `k` for
    which `k + 1 + shift * head` is a multiple of `stride`.

    :ivar first_head: number of the first of `heads` in the whole model, when several places divide them.
    :param block_size: positions in a block of the pattern; the cache's blocks may have any size.
    :raises ValueError: a size, a number of blocks or a stride below 1.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, block_size: int, local_blocks: int, stride: int, shift: int = 0
    ):
        if min(block_size, local_blocks, stride) < 1:
            raise ValueError(
                f"block_size={block_size}, local_blocks={local_blocks} and stride={stride} of a sparse pattern must be "
                "at least 1; check config.json"
            )
        self.heads, self.kv_heads, self.first_head = num_heads, num_kv_heads, 0
        self.size, self.local, self.stride, self.shift = block_size, local_blocks, stride, shift
        self._last: tuple[Batch, int, int, _Layout] | None = None

    def pieces(self, cache: Tensor) -> Tensor:
        """The cache (blocks, kv_heads, block_size, dim) as (pieces, 1, slots, dim); a block is a number of pieces."""
        slots = math.gcd(cache.shape[2], self.size)
        return cache.view(-1, 1, slots, cache.shape[3])

    def layout(self, batch: Batch, group: int, block_size: int) -> _Layout:
        """Of this step; computed by the first of the layers that ask."""
        last = self._last
        if last is None or last[0] is not batch or last[1:3] != (group, block_size):
            self._last = last = (batch, group, block_size, self._layout(batch, group, block_size))
        return last[3]

    def _layout(self, batch: Batch, group: int, block_size: int) -> _Layout:
        heads, device = self.heads, batch.positions.device
        sequence, first, count = runs(batch, self.size)
        rows = None
        if batch.max_query_len > 1:
            row = torch.arange(len(batch.positions), device=device)
            part = torch.repeat_interleave(count, output_size=len(row))  # (tokens,)
            head = torch.arange(heads, device=device)
            rows = (heads * first - first)[part, None] + row[:, None] + head * count[part, None]
        last = batch.positions[first] + count - 1  # (parts,), position of the last query
        seen = self._seen(last // self.size, batch.pages[group].block_table.shape[1] * block_size)
        lens = (seen.sum(-1) - 1) * self.size + (last % self.size + 1)[:, None]  # (parts, heads)
        table = self._table(batch.pages[group].block_table, block_size, sequence, seen)
        rows_of = count.repeat_interleave(heads, output_size=len(first) * heads)  # of each lane
        starts = torch.cat((count.new_zeros(1), rows_of.cumsum(0)))
        return _Layout(rows, table.int(), starts.int(), lens.flatten().int())

    def _seen(self, block: Tensor, keys: int) -> Tensor:
        """block: (parts,) of the queries -> (parts, heads, blocks) bool; `keys` is how many the table has room for."""
        other = torch.arange(-(-keys // self.size), device=block.device)
        offsets = self.shift * (self.first_head + torch.arange(self.heads, device=block.device))
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
        blocks = seen.shape[2]
        most = min(blocks, self.local + -(-blocks // self.stride))  # that a query can see
        order = (~seen).to(torch.int8).argsort(dim=-1, stable=True)[..., :most]  # (parts, heads, most)
        mine = torch.arange(self.heads, device=device) // (self.heads // self.kv_heads)
        return pieces[sequence[:, None, None], mine[:, None], order].flatten(2).flatten(0, 1)


class BlockSparseAttention(nn.Module):
    """Grouped-query attention to the blocks of a `BlockPattern`; the interface of `Attention`.

    :param scale: factor on scores; 1 / sqrt(head_dim) when not given.
    """

    def __init__(self, head_dim: int, pattern: BlockPattern, *, rope: Rope, scale: float | None = None):
        super().__init__()
        self.rope, self.pattern = rope, pattern
        self.scale = head_dim**-0.5 if scale is None else scale
        self.cache_spec = CacheSpec(pattern.kv_heads, head_dim)
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
