"""Attention: causal over a paged cache (rotate, write keys and values, attend), to an encoder, and within one.

Decisions: the layer declares the memory that it needs (`CacheSpec`), the core allocates and attaches it; everything
that changes from step to step comes in the `Batch`.
"""

import itertools

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.kernels import attention as kernel
from modelport.kernels import kv_cache
from modelport.modeling.alibi import Alibi
from modelport.modeling.cache import CacheSpec
from modelport.modeling.chunks import Chunks
from modelport.modeling.rope import Rope


class Attention(nn.Module):
    """Grouped-query attention; `num_heads` is a multiple of `num_kv_heads`.

    :param rope: rotary positions for q and k, or None.
    :param alibi: biases that grow with distance (Press et al., 2022), or None.
    :param scale: factor on scores; 1 / sqrt(head_dim) when not given.
    :param window: attend to the last `window` positions only (sliding window); 0 for all.
    :param chunks: attend within a token's own chunk only, or None; one for all layers that have such. Not together
        with a window or ALiBi, nor where images see ahead.
    :param softcap: scores become `softcap * tanh(scores / softcap)`; 0 for none.
    :param sinks: a learned logit per head, `sinks` (num_heads,), takes probability and gives nothing (gpt-oss).
    :raises ValueError: `num_heads` is not a multiple of `num_kv_heads`.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rope: Rope | None = None,
        alibi: Alibi | None = None,
        scale: float | None = None,
        window: int = 0,
        chunks: Chunks | None = None,
        softcap: float = 0.0,
        sinks: bool = False,
    ):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}; "
                "check config.json"
            )
        if chunks is not None and (window or alibi is not None):
            raise ValueError(f"chunks of {chunks.size} positions cannot be had together with window={window} or ALiBi")
        self.rope, self.alibi, self.softcap, self.window, self.chunks = rope, alibi, softcap, window, chunks
        self.sinks = nn.Parameter(torch.empty(num_heads), requires_grad=False) if sinks else None
        self.scale = head_dim**-0.5 if scale is None else scale
        self.cache_spec = CacheSpec(num_kv_heads, head_dim, window if chunks is None else chunks.size)
        self.k_cache: Tensor | None = None
        self.v_cache: Tensor | None = None
        self.group = 0

    def attach(self, k_cache: Tensor, v_cache: Tensor, group: int) -> None:
        """Take the layer's cache, two tensors (blocks, num_kv_heads, block_size, head_dim); called by the core.

        :param group: which of `Batch.pages` is the layer's.
        """
        self.k_cache, self.v_cache, self.group = k_cache, v_cache, group

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """q: (tokens, num_heads, head_dim), k, v: (tokens, num_kv_heads, head_dim) -> (tokens, num_heads * head_dim).

        q and k are rotated in place: they are fresh results of a projection.
        """
        pages = batch.pages[self.group]
        if self.rope is None:
            kv_cache.write(k, v, self.k_cache, self.v_cache, pages.slots)
        else:
            table, rows = self.rope.angles(batch)
            kv_cache.rope_write(
                q, k, v, rows, table, self.rope.interleaved, self.k_cache, self.v_cache,
                pages.slots,
            )  # fmt: skip
        k_cache, v_cache, longest = self.k_cache, self.v_cache, batch.max_query_len
        table, starts, lens = pages.block_table, batch.query_starts, batch.seq_lens
        if self.chunks is not None:
            assert batch.ends is None, "tokens that see later ones do not go with chunks"
            step = self.chunks.layout(batch, self.group, k_cache)
            table, starts, lens, longest = step.table, step.starts, step.lens, min(longest, self.chunks.size)
            k_cache, v_cache = self.chunks.pieces(k_cache), self.chunks.pieces(v_cache)
        out = kernel.paged_attention(
            q,
            k_cache,
            v_cache,
            table,
            starts,
            lens,
            self.scale,
            window=self.window,
            softcap=self.softcap,
            alibi_slopes=None if self.alibi is None else self.alibi.slopes,
            sinks=None if self.sinks is None else self.sinks.float(),
            max_query_len=longest,
            ends=batch.ends,
        )
        return out.flatten(1)


class CrossAttention(nn.Module):
    """Attention to all tokens of an encoder, or to the media before, whose keys and values are written once.

    :param scale: factor on scores; 1 / sqrt(head_dim) when not given.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, *, scale: float | None = None):
        super().__init__()
        self.scale = head_dim**-0.5 if scale is None else scale
        self.cache_spec = CacheSpec(num_kv_heads, head_dim, cross=True)
        self.k_cache: Tensor | None = None
        self.v_cache: Tensor | None = None
        self.group = 0

    def attach(self, k_cache: Tensor, v_cache: Tensor, group: int) -> None:
        """As `Attention.attach`."""
        self.k_cache, self.v_cache, self.group = k_cache, v_cache, group

    def write(self, k: Tensor, v: Tensor, batch: Batch) -> None:
        """Keep k, v: (rows of states, num_kv_heads, head_dim), made of `batch.encoded.states`."""
        kv_cache.write(k, v, self.k_cache, self.v_cache, batch.pages[self.group].slots)

    def forward(self, q: Tensor, batch: Batch) -> Tensor:
        """q: (rows, num_heads, head_dim), those of `batch.encoded` -> (rows, num_heads * head_dim)."""
        seen = batch.encoded
        return kernel.paged_attention(
            q,
            self.k_cache,
            self.v_cache,
            batch.pages[self.group].block_table,
            seen.query_starts,
            seen.lens,
            self.scale,
            max_query_len=seen.max_query_len,
            ends=seen.ends,
        ).flatten(1)


class EncoderAttention(nn.Module):
    """Attention of every token of a sequence to all its tokens; nothing is kept.

    :param scale: factor on scores; 1 / sqrt(head_dim) when not given.
    """

    def __init__(self, head_dim: int, *, scale: float | None = None):
        super().__init__()
        self.scale = head_dim**-0.5 if scale is None else scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        """q, k, v: (tokens, heads, head_dim), starts: (seqs + 1,) first row of each -> (tokens, heads * head_dim).

        Neighbours of the same length, such as the tiles of an image, are computed together.
        """
        out, edges, first = torch.empty(q.shape, dtype=q.dtype, device=q.device), starts.tolist(), 0
        for length, run in itertools.groupby(end - start for start, end in itertools.pairwise(edges)):
            seqs = sum(1 for _ in run)
            end = first + seqs * length
            if length:
                parts = (part[first:end].unflatten(0, (seqs, length)).transpose(1, 2) for part in (q, k, v))
                attended = nn.functional.scaled_dot_product_attention(
                    *parts, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
                )  # (seqs, heads, length, head_dim)
                out[first:end] = attended.transpose(1, 2).flatten(0, 1)
            first = end
        return out.flatten(1)
