"""Attention of new tokens over a paged key-value cache, causal unless told where each row's keys end.

Legend: heads = kv_heads * group; L = padded number of keys; ql = queries of one sequence in this step. A sequence's
queries are the last positions of its `seq_lens` keys, so decode rows (ql = 1) and prefill chunks mix freely.
"""

import torch
from torch import Tensor

from modelport.kernels import cpu, gpu


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_starts: Tensor, seq_lens: Tensor,
    scale: float, *, window: int = 0, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, ends: Tensor | None = None, max_query_len: int,
) -> Tensor:  # fmt: skip
    """Plain torch version of `paged_attention`: one batched product for all decode rows, one per prefill chunk."""
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[3])
    starts, lens = query_starts.tolist(), seq_lens.tolist()
    spans = [(i, starts[i], starts[i + 1]) for i in range(len(lens)) if starts[i + 1] > starts[i]]
    decode = [(i, a) for i, a, b in spans if b - a == 1]
    chunks = [([i], torch.arange(a, b, device=q.device)) for i, a, b in spans if b - a > 1]
    if decode:
        chunks.append(([i for i, _ in decode], torch.tensor([a for _, a in decode], device=q.device)))
    for seqs, rows in chunks:
        mine = q[rows].view(len(seqs), -1, *q.shape[1:])  # (seqs, ql, heads, head_dim)
        lengths = seq_lens[seqs].long()
        blocks = -(-max(lens[i] for i in seqs) // k_cache.shape[2])
        table = block_table[seqs, :blocks].long().clamp(0, k_cache.shape[0] - 1)  # padding entries may hold anything
        limits = None if ends is None else ends[rows].view(len(seqs), -1)
        result = _attend(
            mine, k_cache[table], v_cache[table], lengths, limits, scale, window, softcap, alibi_slopes, sinks
        )  # fmt: skip
        out[rows] = result.flatten(0, 1).to(out.dtype)
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, ends: Tensor | None, scale: float, window: int, softcap: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """q: (seqs, ql, heads, head_dim); k, v: (seqs, blocks, kv_heads, block_size, dim); lengths: (seqs,);
    ends: (seqs, ql) -> (seqs, ql, heads, v_dim)."""
    seqs, ql, heads, _ = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    k = k.transpose(1, 2).flatten(2, 3).float()  # (seqs, kv_heads, L, head_dim)
    v = v.transpose(1, 2).flatten(2, 3).float()
    key_pos = torch.arange(k.shape[2], device=q.device)
    query_pos = lengths[:, None] - ql + torch.arange(ql, device=q.device)  # (seqs, ql)
    distance = key_pos - query_pos[:, :, None]  # (seqs, ql, L), 0 is the query itself
    seen = distance <= 0 if ends is None else (key_pos < ends[:, :, None]) & (key_pos < lengths[:, None, None])
    if window > 0:
        seen &= distance > -window
    # slots nobody wrote, and freed ones, may hold NaN, and 0 * NaN is NaN
    v = v.masked_fill(~seen.any(1)[:, None, :, None], 0.0)
    q = q.float().view(seqs, ql, kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (q @ k.transpose(-1, -2) * scale).view(seqs, kv_heads, group, ql, k.shape[2])
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.float().view(kv_heads, group, 1, 1) * distance[:, None, None]
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    if sinks is not None:
        extra = sinks.float().view(1, kv_heads, group, 1, 1).expand(seqs, -1, -1, ql, 1)
        weights = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    if ends is not None:
        weights = weights.masked_fill(~seen.any(-1)[:, None, None, :, None], 0.0)  # a row without keys, else NaN
    out = weights.flatten(2, 3) @ v  # (seqs, kv_heads, group * ql, v_dim)
    return out.view(seqs, kv_heads, group, ql, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_starts: Tensor, seq_lens: Tensor,
           alibi_slopes: Tensor | None, sinks: Tensor | None, ends: Tensor | None) -> None:  # fmt: skip
    if q.dim() != 3 or k_cache.dim() != 4 or v_cache.dim() != 4 or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"paged_attention: q {tuple(q.shape)} must be (tokens, heads, head_dim), caches "
                         f"{tuple(k_cache.shape)}, {tuple(v_cache.shape)} (blocks, kv_heads, slots, dim)")  # fmt: skip
    if q.shape[2] != k_cache.shape[3] or q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"paged_attention: q {tuple(q.shape)} does not fit k_cache {tuple(k_cache.shape)}: head_dim "
                         "must agree and heads be a multiple of kv_heads")  # fmt: skip
    seqs = seq_lens.shape[0]
    if query_starts.shape != (seqs + 1,) or block_table.dim() != 2 or block_table.shape[0] < seqs:
        raise ValueError(f"paged_attention: {seqs} sequences need query_starts ({seqs + 1},) and block_table ({seqs}, "
                         f"max_blocks), got {tuple(query_starts.shape)} and {tuple(block_table.shape)}")  # fmt: skip
    for name, extra in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if extra is not None and extra.shape != q.shape[1:2]:
            raise ValueError(f"paged_attention: {name} {tuple(extra.shape)} must be ({q.shape[1]},)")
    if ends is not None and ends.shape != q.shape[:1]:
        raise ValueError(f"paged_attention: ends {tuple(ends.shape)} must be ({q.shape[0]},), one for each row of q")


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_starts: Tensor, seq_lens: Tensor,
    scale: float, *, window: int = 0, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, ends: Tensor | None = None, max_query_len: int,
) -> Tensor:  # fmt: skip
    """Attend q: (tokens, heads, head_dim) to the cached keys of its own sequence -> (tokens, heads, v_head_dim).

    k_cache, v_cache: (num_blocks, kv_heads, block_size, head_dim), already holding this step's keys and values.
    block_table: (seqs, max_blocks) int32; entries past a sequence's last block are never read as data.
    query_starts: (seqs + 1,) int32, where each sequence's rows begin in q; seq_lens: (seqs,) int32, keys by now.
    window > 0 keeps keys closer than `window` positions; softcap > 0 bends scores to softcap * tanh(score / softcap);
    alibi_slopes: (heads,) float32 adds slope * (key position - query position); sinks: (heads,) float32 is one more
    logit that takes probability and gives nothing. Sums are float32. Rows after query_starts[-1] are zero.
    ends: (tokens,) int32, row t sees the cached keys [0, ends[t]) and not those up to its own position: all keys of an
    encoder for cross attention, to the end of its image for a row of one. Nothing past seq_lens is read; a row without
    keys gets zero. A row's own position stays what its place among the sequence's last keys says and then only serves
    `window`, which counts back from it and leaves later keys alone, and `alibi_slopes`; without these two, a sequence
    may have fewer keys than rows.
    Keys before the window of a sequence's first row are never read: their blocks may be given to somebody else, and
    their entries in block_table may hold anything. v_cache may be a view of k_cache, with a head_dim of its own.
    """
    on_gpu = gpu.takes(q)
    if not on_gpu and cpu.lib is not None and q.dim() == 3:
        out = torch.empty((q.shape[0], q.shape[1], v_cache.shape[-1]), dtype=q.dtype)
        if cpu.lib.paged_attention(
            q, k_cache, v_cache, block_table, query_starts, seq_lens, alibi_slopes, sinks, ends, out, scale, window,
            softcap, cpu.threads(),
        ):  # fmt: skip
            return out
    _check(q, k_cache, v_cache, block_table, query_starts, seq_lens, alibi_slopes, sinks, ends)
    if on_gpu and all(t.stride(-1) == 1 for t in (q, k_cache, v_cache, block_table)):
        return gpu.attention.paged_attention(
            q, k_cache, v_cache, block_table, query_starts, seq_lens, scale, window, softcap, alibi_slopes, sinks,
            ends, max_query_len,
        )  # fmt: skip
    return paged_attention_reference(
        q, k_cache, v_cache, block_table, query_starts, seq_lens, scale, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, ends=ends, max_query_len=max_query_len,
    )  # fmt: skip
