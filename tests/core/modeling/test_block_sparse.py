"""Block-sparse attention against one product with a mask."""

import pytest
import torch

from modelport.batch import Batch, Pages
from modelport.config import RopeParameters
from modelport.kernels import rope as rope_kernel
from modelport.modeling import BlockPattern, BlockSparseAttention, Rope

HEADS, KV_HEADS, DIM, SIZE, LOCAL, STRIDE = 4, 2, 8, 8, 2, 3
LENGTHS = (61, 7, 40)


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope, shift: int) -> torch.Tensor:
    """One whole sequence, (tokens, heads, dim) -> (tokens, heads * dim)."""
    positions = torch.arange(len(q))
    q, k = q.clone(), k.clone()
    rope_kernel.rotate_reference(q, positions, rope.cos_sin, rope.interleaved)
    rope_kernel.rotate_reference(k, positions, rope.cos_sin, rope.interleaved)
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(0, 1) for part in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * DIM**-0.5
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for head in range(HEADS):
        for query in range(len(q)):
            for key in range(query + 1):
                near = query // SIZE - key // SIZE < LOCAL
                mask[head, query, key] = near or (key // SIZE + 1 + shift * head) % STRIDE == 0
    assert not mask.tril().equal(torch.ones_like(mask).tril()) or len(q) <= SIZE * LOCAL
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("block_size", [4, 8, 12, 32])
@pytest.mark.parametrize("shift", [0, 1])
@torch.inference_mode()
def test_every_head_sees_its_blocks_however_a_prompt_is_cut(block_size, shift):
    """Several sequences in a step: whole, in chunks that begin within a block, and token by token."""
    torch.manual_seed(0)
    rope = Rope(DIM, RopeParameters())
    layer = BlockSparseAttention(DIM, BlockPattern(HEADS, KV_HEADS, SIZE, LOCAL, STRIDE, shift), rope=rope)
    rope.build_tables(torch.device("cpu"), 64)
    assert layer.cache_spec.bytes_per_block(16, torch.float32) == KV_HEADS * 16 * 2 * DIM * 4  # a key lies there once
    blocks = -(-64 // block_size)
    caches = [torch.full((3 * blocks, KV_HEADS, block_size, DIM), float("nan")) for _ in range(2)]  # anything at first
    layer.attach(*caches, 0)
    table = torch.randperm(3 * blocks).view(3, blocks).int()
    parts = [tuple(torch.randn(n, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)) for n in LENGTHS]
    found: list[list[torch.Tensor]] = [[], [], []]
    done, step = [0, 0, 0], 0
    while any(a < n for a, n in zip(done, LENGTHS, strict=True)):
        wanted = ((61, 1, 13), (1, 1, 9), (1, 1, 1))[min(step, 2)]
        spans = [(i, a, min(a + w, n)) for i, (a, w, n) in enumerate(zip(done, wanted, LENGTHS, strict=True)) if a < n]
        positions = torch.cat([torch.arange(a, b) for _, a, b in spans])
        sequence = torch.cat([torch.full((b - a,), i) for i, a, b in spans])
        slots = table[sequence, positions // block_size].long() * block_size + positions % block_size
        counts = torch.tensor([b - a for _, a, b in spans])
        starts, lens = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int(), torch.tensor([b for *_, b in spans])
        pages = Pages(table[[i for i, *_ in spans]], slots)
        batch = Batch(positions, starts, lens.int(), (pages,), lens.int() * 0, int(counts.max()))
        out = layer(*(torch.cat([parts[i][kind][a:b] for i, a, b in spans]) for kind in range(3)), batch)
        for (i, _, b), rows in zip(spans, out.split(counts.tolist()), strict=True):
            found[i].append(rows)
            done[i] = b
        step += 1
    for rows, part in zip(found, parts, strict=True):
        torch.testing.assert_close(torch.cat(rows), expected(*part, rope, shift), rtol=1e-5, atol=1e-5)


def test_a_pattern_without_blocks_is_refused():
    with pytest.raises(ValueError, match="local_blocks=0"):
        BlockPattern(4, 2, 16, 0, 3)
