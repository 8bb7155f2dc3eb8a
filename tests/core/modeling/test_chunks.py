"""Attention within chunks of positions against one product with a mask."""

from dataclasses import replace

import pytest
import torch

from modelport.batch import Batch, Pages
from modelport.config import RopeParameters
from modelport.kernels import cpu
from modelport.kernels import rope as rope_kernel
from modelport.modeling import Alibi, Attention, Chunks, Rope

HEADS, KV_HEADS, DIM, SIZE = 4, 2, 8, 12
LENGTHS = (61, 7, 40)


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope | None, size: int) -> torch.Tensor:
    """One whole sequence, (tokens, heads, dim) -> (tokens, heads * dim)."""
    position = torch.arange(len(q))
    q, k = q.clone(), k.clone()
    if rope is not None:
        rope_kernel.rotate_reference(q, position, rope.cos_sin, rope.interleaved)
        rope_kernel.rotate_reference(k, position, rope.cos_sin, rope.interleaved)
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(0, 1) for part in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * DIM**-0.5
    chunk = position // size
    seen = (chunk[:, None] == chunk) & (position[:, None] >= position)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("block_size", [4, 6, 8, 12, 16, 32])
@pytest.mark.parametrize("size", [SIZE, 1, 100])
@torch.inference_mode()
def test_a_token_sees_its_own_chunk_however_a_prompt_is_cut(in_pieces, monkeypatch, size, block_size, compiled):
    """Two layers that share the chunks, of which one has rotary positions; blocks before the chunk are taken away."""
    if not compiled:
        monkeypatch.setattr(cpu, "lib", None)
    torch.manual_seed(0)
    rope, chunks = Rope(DIM, RopeParameters(), interleaved=True), Chunks(size)
    rope.build_tables(torch.device("cpu"), 64)
    parts = [tuple(torch.randn(n, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)) for n in LENGTHS]
    for of_layer in (None, rope):
        layer = Attention(HEADS, KV_HEADS, DIM, rope=of_layer, chunks=chunks)
        assert layer.cache_spec.window == size  # so that memory is bounded by a chunk
        found = in_pieces(layer, parts, block_size, window=size)
        for rows, part in zip(found, parts, strict=True):
            torch.testing.assert_close(rows, expected(*part, of_layer, size), rtol=1e-5, atol=1e-5)


def test_rows_of_no_sequence_read_nothing():
    """Recorded steps have room for more sequences than run; a table may lead nowhere where a chunk has passed."""
    layer = Attention(HEADS, KV_HEADS, DIM, chunks=Chunks(8))
    layer.attach(*torch.randn(2, 3, KV_HEADS, 4, DIM), 0)
    table = torch.tensor([[-1, -1, 2, 1], [0, 0, 0, 0]], dtype=torch.int32)
    starts, lens = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([11, 0], dtype=torch.int32)
    batch = Batch(torch.tensor([10, 0]), starts, lens, (Pages(table, torch.tensor([6, 0])),), lens * 0, 1)
    step = layer.chunks.layout(batch, 0, layer.k_cache)
    assert step.starts is starts
    assert step.lens[0] == 3
    assert (step.table[0] >= 0).all()
    q, k = torch.randn(2, HEADS, DIM), torch.randn(2, KV_HEADS, DIM)
    alone = layer(q[:1], k[:1], k[:1], replace(batch, positions=batch.positions[:1], query_starts=starts[:2],
                  seq_lens=lens[:1], pages=(Pages(table[:1], torch.tensor([6])),)))  # fmt: skip
    out = layer(q, k, k, batch)
    torch.testing.assert_close(out[:1], alone)
    assert not out[1].any()


def test_chunks_and_what_counts_from_a_sequences_end_are_refused_together():
    with pytest.raises(ValueError, match="window=4"):
        Attention(4, 2, 8, window=4, chunks=Chunks(8))
    with pytest.raises(ValueError, match="chunks of 8 positions"):
        Attention(4, 2, 8, alibi=Alibi(4), chunks=Chunks(8))
    with pytest.raises(ValueError, match="attention_chunk_size=0"):
        Chunks(0)
