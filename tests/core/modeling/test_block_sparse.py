"""Block-sparse attention against one product with a mask."""

import pytest
import torch

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
def test_every_head_sees_its_blocks_however_a_prompt_is_cut(in_pieces, block_size, shift):
    """Several sequences in a step: whole, in chunks that begin within a block, and token by token."""
    torch.manual_seed(0)
    rope = Rope(DIM, RopeParameters())
    layer = BlockSparseAttention(DIM, BlockPattern(HEADS, KV_HEADS, SIZE, LOCAL, STRIDE, shift), rope=rope)
    rope.build_tables(torch.device("cpu"), 64)
    assert layer.cache_spec.bytes_per_block(16, torch.float32) == KV_HEADS * 16 * 2 * DIM * 4  # a key lies there once
    parts = [tuple(torch.randn(n, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)) for n in LENGTHS]
    for rows, part in zip(in_pieces(layer, parts, block_size), parts, strict=True):
        torch.testing.assert_close(rows, expected(*part, rope, shift), rtol=1e-5, atol=1e-5)


def test_a_pattern_without_blocks_is_refused():
    with pytest.raises(ValueError, match="local_blocks=0"):
        BlockPattern(4, 2, 16, 0, 3)
