"""Attention within chunks of positions (Llama 4): a query sees the keys from the beginning of its own chunk to itself.

Decisions: a step is laid out anew for the attention kernel: a sequence of it is what one sequence computes now in one
chunk, and its table begins where the chunk begins. So no kernel knows of chunks, no mask exists, and no key that is not
seen is read. What lies before a sequence's last chunk is given back like what a sliding window has passed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelport.batch import Batch


@dataclass(frozen=True)
class _Layout:
    """A step as the kernel is to see it.

    :ivar table: (runs, pieces) int32, pieces of the cache from the beginning of a run's chunk on.
    :ivar starts: (runs + 1,) int32, first row of each run; `lens`: (runs,) int32, keys of each.
    """

    table: Tensor
    starts: Tensor
    lens: Tensor


def runs(batch: Batch, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of one sequence whose positions lie in the same `size`: sequence, first row and number of rows of each run.

    With one row for each sequence, and possibly rows that belong to none, every row is a run.
    """
    positions, device = batch.positions, batch.positions.device
    row = torch.arange(len(positions), device=device)
    sequence = torch.bucketize(row, batch.query_starts[1:].long(), right=True)
    sequence.clamp_(max=len(batch.seq_lens) - 1)
    if batch.max_query_len == 1:
        return sequence, row, torch.ones_like(row)
    begins = positions % size == 0
    begins[batch.query_starts[:-1].long().clamp(max=len(positions) - 1)] = True
    first = begins.nonzero()[:, 0]
    count = torch.cat((first[1:], first.new_tensor([len(positions)]))) - first
    return sequence[first], first, count


class Chunks:
    """Chunks of `size` positions, and the layout of the present step; layers with equal chunks share it.

    :raises ValueError: a size below 1.
    """

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"attention_chunk_size={size} must be at least 1; check config.json")
        self.size = size
        self._last: tuple[Batch, int, torch.Size, _Layout] | None = None

    def pieces(self, cache: Tensor) -> Tensor:
        """The cache (blocks, kv_heads, block_size, dim) as (pieces, kv_heads, slots, dim), so that chunks begin with a
        piece; pieces overlap in memory, since those of one head lie behind one another."""
        blocks, heads, size, dim = cache.shape
        slots = math.gcd(size, self.size)
        count = ((blocks - 1) * heads + 1) * (size // slots)
        return cache.as_strided((count, heads, slots, dim), (slots * dim, size * dim, dim, 1))

    def layout(self, batch: Batch, group: int, cache: Tensor) -> _Layout:
        """Of this step, for a cache of this shape; computed by the first of the layers that ask."""
        last = self._last
        if last is None or last[0] is not batch or last[1:3] != (group, cache.shape[1:3]):
            made = self._layout(batch, batch.pages[group].block_table, *cache.shape[1:3])
            self._last = last = (batch, group, cache.shape[1:3], made)
        return last[3]

    def _layout(self, batch: Batch, block_table: Tensor, heads: int, block_size: int) -> _Layout:
        if batch.max_query_len == 1:  # rows that belong to no sequence stay out: blocks they would read may be gone
            sequence = torch.arange(len(batch.seq_lens), device=block_table.device)
            last, starts = batch.seq_lens.long().sub(1).clamp_(min=0), batch.query_starts
        else:
            sequence, first, count = runs(batch, self.size)
            last = batch.positions[first] + count - 1  # (runs,), position of the last query
            starts = torch.cat((first, first.new_full((1,), len(batch.positions)))).int()
        slots = math.gcd(block_size, self.size)
        in_block, in_chunk = block_size // slots, self.size // slots
        room = block_table.shape[1] * in_block
        piece = torch.arange(min(in_chunk, room), device=last.device)
        piece = ((last // self.size * in_chunk)[:, None] + piece).clamp_(max=room - 1)  # of the sequence's
        table = block_table[sequence[:, None], piece // in_block] * (heads * in_block) + piece % in_block
        return _Layout(table.int(), starts, (last % self.size + 1).int())
