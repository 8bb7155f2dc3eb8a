"""Attention layers by themselves: sequences in a step side by side, cut in several ways."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelport.batch import Batch, Pages

Parts = tuple[Tensor, Tensor, Tensor]


def run_in_pieces(layer: nn.Module, parts: list[Parts], block_size: int, window: int = 0) -> list[Tensor]:
    """Whole, in chunks that begin anywhere, and token by token; -> (tokens, heads * dim) of each sequence.

    :param parts: q, k and v of each sequence, (tokens, heads, dim).
    :param window: blocks that lie this far behind a sequence's first row are taken away, and hold anything.
    """
    lengths = [len(q) for q, *_ in parts]
    _, kv_heads, dim = parts[0][1].shape
    blocks = -(-max(lengths) // block_size)
    # anything at first
    caches = [torch.full((len(parts) * blocks, kv_heads, block_size, dim), float("nan")) for _ in range(2)]
    layer.attach(*caches, 0)
    table = torch.randperm(len(parts) * blocks).view(len(parts), blocks).int()
    found: list[list[Tensor]] = [[] for _ in parts]
    done, step = [0] * len(parts), 0
    while any(a < n for a, n in zip(done, lengths, strict=True)):
        wanted = ((61, 1, 13), (1, 1, 9), (1, 1, 1))[min(step, 2)]
        spans = [(i, a, min(a + w, n)) for i, (a, w, n) in enumerate(zip(done, wanted, lengths, strict=True)) if a < n]
        if window:
            for i, a, _ in spans:
                for gone in table[i, : max(0, a - window + 1) // block_size].tolist():
                    if gone >= 0:
                        for cache in caches:
                            cache[gone] = float("nan")
                table[i, : max(0, a - window + 1) // block_size] = -1
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
    return [torch.cat(rows) for rows in found]


@pytest.fixture
def in_pieces() -> Callable[..., list[Tensor]]:
    return run_in_pieces
