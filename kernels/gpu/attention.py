"""Paged attention: a kernel for rows that are alone in their sequence (decode), another for chunks of prompts.

Both take the query heads that share a key head together, so that keys and values are read once for them, and keep a
running softmax (Milakov and Gimelshein, 2018; Dao et al., 2022). Decode splits a long context over programs, whose
parts a third kernel joins. Which sequence a program works on it finds in `query_starts` itself, so a launch depends on
shapes alone.

Keys of any size of block are read through the block table one by one; a head's dimensions are two powers of two, wide
(D1) and rest (D2), which wastes little: 80 = 64 + 16, 576 = 512 + 64. Where values are the beginning of the keys
(latent attention) and as wide as D1, they are not read again.

Legend: rows: (query, head) pairs of a tile, head fastest; keys: a tile of BLOCK_N; s: a program's sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelport.kernels import gpu

PROGRAMS = 132 * 4  # what decode splits for: a few for each multiprocessor of a large GPU
MOST_SPLITS = 64
LOG2E = tl.constexpr(1.4426950408889634)  # powers of 2 are what the hardware has
WIDE = tl.constexpr(gpu.interpreted)  # the interpreter multiplies matrices of bfloat16 wrongly


@triton.jit
def dot(a, b, c):
    """a @ b + c in float32; a takes b's type."""
    a = a.to(b.dtype)
    if WIDE or a.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)


@triton.jit
def _queries(q, row, head, q_token, q_head, mask, dim, D1: tl.constexpr, D2: tl.constexpr):
    """Both parts of the rows, zero where there is nothing; the second is the first again when D2 is 0."""
    base = q + row.to(tl.int64)[:, None] * q_token + head[:, None] * q_head
    d1 = tl.arange(0, D1)[None, :]
    first = tl.load(base + d1, mask=mask[:, None] & (d1 < dim), other=0.0)
    second = first
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)[None, :]
        second = tl.load(base + d2, mask=mask[:, None] & (d2 < dim), other=0.0)
    return first, second


@triton.jit
def _tile(
    first, second, m, total, acc, k_cache, v_cache, table, key, live, seen, distance, slopes, k_block, k_slot, v_block,
    v_slot, block_size: tl.constexpr, scale, softcap, dim, v_dim, KIND: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, SHARED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Attend to one tile of keys.

    key: (BLOCK_N,), live: (BLOCK_N,) those that may be read; seen, distance: (rows, BLOCK_N).
    """
    block = tl.load(table + key // block_size, mask=live, other=0).to(tl.int64)
    slot = (key % block_size).to(tl.int64)
    at_k = k_cache + block * k_block + slot * k_slot
    d1 = tl.arange(0, D1)
    k1 = tl.load(at_k[None, :] + d1[:, None], mask=live[None, :] & (d1 < dim)[:, None], other=0.0).to(KIND)
    scores = dot(first, k1, tl.zeros((first.shape[0], key.shape[0]), tl.float32))
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        k2 = tl.load(at_k[None, :] + d2[:, None], mask=live[None, :] & (d2 < dim)[:, None], other=0.0).to(KIND)
        scores = dot(second, k2, scores)
    scores *= scale
    if SOFTCAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    if ALIBI:
        scores += slopes[:, None] * distance.to(tl.float32)
    scores = tl.where(seen, scores * LOG2E, float("-inf"))
    best = tl.maximum(m, tl.max(scores, 1))
    base = tl.where(best == float("-inf"), 0.0, best)  # a row that saw nothing yet
    p = tl.exp2(scores - base[:, None])
    fade = tl.exp2(m - base)
    if SHARED:
        v = tl.trans(k1)
    else:
        dv = tl.arange(0, DV)
        at_v = v_cache + block * v_block + slot * v_slot
        v = tl.load(at_v[:, None] + dv[None, :], mask=live[:, None] & (dv < v_dim)[None, :], other=0.0).to(KIND)
    return best, total * fade + tl.sum(p, 1), dot(p, v, acc * fade[:, None])


@triton.jit
def _decode(
    q, k_cache, v_cache, table, starts, lens, slopes, sinks, ends, out, part, part_m, part_l, tokens, seqs, splits,
    group, q_token, q_head, table_row, k_block, k_head, k_slot, v_block, v_head, v_slot, out_token, out_head,
    block_size: tl.constexpr, scale, window, softcap, dim, v_dim, ENDS: tl.constexpr, ALIBI: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, SHARED: tl.constexpr, WHOLE: tl.constexpr, FILL: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    s, split = tl.program_id(0), tl.program_id(2)
    tiles = tl.cdiv(group, HEADS)
    kv_head, of_group = tl.program_id(1) // tiles, tl.program_id(1) % tiles * HEADS + tl.arange(0, HEADS)
    mine = of_group < group
    head = kv_head * group + of_group
    dv = tl.arange(0, DV)
    if FILL:  # rows of no sequence are zero
        if (s < tokens) & (s >= tl.load(starts + seqs)):
            place = out + s.to(tl.int64) * out_token + head[:, None] * out_head + dv[None, :]
            tl.store(place, tl.zeros((HEADS, DV), out.dtype.element_ty), mask=mine[:, None] & (dv < v_dim)[None, :])
    if s < seqs:
        row = tl.load(starts + s)
        if tl.load(starts + s + 1) - row == 1:
            length = tl.load(lens + s)
            position, high = length - 1, length
            if ENDS:
                high = tl.minimum(length, tl.load(ends + row))
            low = 0
            if window > 0:
                low = tl.maximum(0, position - window + 1)
            each = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), BLOCK_N) * BLOCK_N
            begin = low + split * each
            end = tl.minimum(begin + each, high)
            rows = tl.zeros((HEADS,), tl.int32) + row
            first, second = _queries(q, rows, head, q_token, q_head, mine, dim, D1, D2)
            slope = tl.zeros((HEADS,), tl.float32)
            if ALIBI:
                slope = tl.load(slopes + head, mask=mine, other=0.0)
            m = tl.full((HEADS,), float("-inf"), tl.float32)
            total = tl.zeros((HEADS,), tl.float32)
            if SINKS:
                if split == 0:
                    m = tl.load(sinks + head, mask=mine, other=0.0) * LOG2E
                    total += 1.0
            acc = tl.zeros((HEADS, DV), tl.float32)
            at = table + s.to(tl.int64) * table_row
            k_mine = k_cache + kv_head.to(tl.int64) * k_head
            v_mine = v_cache + kv_head.to(tl.int64) * v_head
            for start in range(begin, end, BLOCK_N):
                key = start + tl.arange(0, BLOCK_N)
                live = key < end
                seen = live[None, :] & mine[:, None]
                m, total, acc = _tile(
                    first, second, m, total, acc, k_mine, v_mine, at, key, live, seen, (key - position)[None, :], slope,
                    k_block, k_slot, v_block, v_slot, block_size, scale, softcap, dim, v_dim, q.dtype.element_ty,
                    ALIBI, SOFTCAP, SHARED, D1, D2, DV,
                )  # fmt: skip
            if WHOLE:
                result = acc / tl.where(total > 0, total, 1.0)[:, None]
                place = out + row.to(tl.int64) * out_token + head[:, None] * out_head + dv[None, :]
                tl.store(place, result.to(out.dtype.element_ty), mask=mine[:, None] & (dv < v_dim)[None, :])
            else:
                heads = tl.num_programs(1) // tiles * group
                place = (s.to(tl.int64) * heads + head) * splits + split
                tl.store(part_m + place, m, mask=mine)
                tl.store(part_l + place, total, mask=mine)
                mask = mine[:, None] & (dv < v_dim)[None, :]
                tl.store(part + place[:, None] * v_dim + dv[None, :], acc, mask=mask)


@triton.jit
def _join(
    part, part_m, part_l, starts, out, tokens, seqs, splits, out_token, out_head, v_dim, FILL: tl.constexpr,
    SPLITS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    s, head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    dv, split = tl.arange(0, DV), tl.arange(0, SPLITS)
    if FILL:
        if (s < tokens) & (s >= tl.load(starts + seqs)):
            place = out + s.to(tl.int64) * out_token + head * out_head + dv
            tl.store(place, tl.zeros((DV,), out.dtype.element_ty), mask=dv < v_dim)
    if s < seqs:
        row = tl.load(starts + s)
        if tl.load(starts + s + 1) - row == 1:
            place = (s.to(tl.int64) * heads + head) * splits + split
            m = tl.load(part_m + place, mask=split < splits, other=float("-inf"))
            sums = tl.load(part_l + place, mask=split < splits, other=0.0)
            best = tl.max(m, 0)
            share = tl.where(m == float("-inf"), 0.0, tl.exp2(m - tl.where(best == float("-inf"), 0.0, best)))
            mask = (split < splits)[:, None] & (dv < v_dim)[None, :]
            parts = tl.load(part + place[:, None] * v_dim + dv[None, :], mask=mask, other=0.0)
            total = tl.sum(sums * share, 0)
            result = tl.sum(parts * share[:, None], 0) / tl.where(total > 0, total, 1.0)
            place = out + row.to(tl.int64) * out_token + head * out_head + dv
            tl.store(place, result.to(out.dtype.element_ty), mask=dv < v_dim)


@triton.jit
def _prefill(
    q, k_cache, v_cache, table, starts, lens, slopes, sinks, ends, out, seqs, group, q_token, q_head, table_row,
    k_block, k_head, k_slot, v_block, v_head, v_slot, out_token, out_head, block_size: tl.constexpr, scale,
    window, softcap, dim, v_dim, ENDS: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr,
    SHARED: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    # The tile's sequence: the last whose first tile, counting one more than it can need for each, is not past this.
    tile, low, high = tl.program_id(0), 0, seqs
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts + middle) // QUERIES + middle <= tile
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    s = low
    begins, stops = tl.load(starts + s), tl.load(starts + s + 1)
    ql = stops - begins
    chunk = tile - (begins // QUERIES + s)
    if (ql > 1) & (chunk * QUERIES < ql):
        tiles = tl.cdiv(group, HEADS)
        kv_head = tl.program_id(1) // tiles
        flat = tl.arange(0, QUERIES * HEADS)
        query, of_group = chunk * QUERIES + flat // HEADS, tl.program_id(1) % tiles * HEADS + flat % HEADS
        mine = (query < ql) & (of_group < group)
        head, row = kv_head * group + of_group, begins + query
        length = tl.load(lens + s)
        position = length - ql + query
        if ENDS:
            limit = tl.minimum(tl.load(ends + row, mask=mine, other=0), length)
        else:
            limit = position + 1
        limit = tl.where(mine, limit, 0)
        end = tl.max(limit, 0)
        begin = 0
        if window > 0:
            begin = tl.maximum(0, length - ql + chunk * QUERIES - window + 1)
        first, second = _queries(q, row, head, q_token, q_head, mine, dim, D1, D2)
        slope = tl.zeros((QUERIES * HEADS,), tl.float32)
        if ALIBI:
            slope = tl.load(slopes + head, mask=mine, other=0.0)
        m = tl.full((QUERIES * HEADS,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES * HEADS,), tl.float32)
        if SINKS:
            m = tl.load(sinks + head, mask=mine, other=0.0) * LOG2E
            total += 1.0
        acc = tl.zeros((QUERIES * HEADS, DV), tl.float32)
        at = table + s.to(tl.int64) * table_row
        k_mine = k_cache + kv_head.to(tl.int64) * k_head
        v_mine = v_cache + kv_head.to(tl.int64) * v_head
        for start in range(begin, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            live = key < end
            distance = key[None, :] - position[:, None]
            seen = key[None, :] < limit[:, None]
            if window > 0:
                seen = seen & (distance > -window)
            m, total, acc = _tile(
                first, second, m, total, acc, k_mine, v_mine, at, key, live, seen, distance, slope, k_block, k_slot,
                v_block, v_slot, block_size, scale, softcap, dim, v_dim, q.dtype.element_ty, ALIBI, SOFTCAP, SHARED,
                D1, D2, DV,
            )  # fmt: skip
        dv = tl.arange(0, DV)
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        place = out + row.to(tl.int64)[:, None] * out_token + head[:, None] * out_head + dv[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=mine[:, None] & (dv < v_dim)[None, :])


def _parts(dim: int) -> tuple[int, int]:
    """`dim` as a power of two and the power of two that holds the rest, 0 when there is none; at least 16 each."""
    wide = max(16, triton.next_power_of_2(dim))
    if wide == dim or wide == 16:
        return wide, 0
    first = wide // 2
    second = max(16, triton.next_power_of_2(dim - first))
    return (wide, 0) if first + second >= wide else (first, second)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_starts: Tensor, seq_lens: Tensor,
    scale: float, window: int, softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None, ends: Tensor | None,
    max_query_len: int,
) -> Tensor:  # fmt: skip
    """As `modelport.kernels.attention.paged_attention`; last dimensions are dense."""
    tokens, heads, dim = q.shape
    kv_heads, block_size, v_dim = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    seqs, group = seq_lens.shape[0], heads // kv_heads
    new = torch.empty if max_query_len == 1 else torch.zeros
    out = new((tokens, heads, v_dim), dtype=q.dtype, device=q.device)
    if not tokens or not v_dim:
        return out
    if not seqs:
        return out.zero_()
    d1, d2 = _parts(dim)
    dv = max(16, triton.next_power_of_2(v_dim))
    shared = v_cache.data_ptr() == k_cache.data_ptr() and v_cache.stride() == k_cache.stride() and dv == d1 == v_dim
    tensors = (
        q, k_cache, v_cache, block_table, query_starts, seq_lens, query_starts if alibi_slopes is None else
        alibi_slopes, query_starts if sinks is None else sinks, query_starts if ends is None else ends, out,
    )  # fmt: skip
    strides = (
        q.stride(0), q.stride(1), block_table.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], out.stride(0),
        out.stride(1), block_size, scale, window, softcap, dim, v_dim,
    )  # fmt: skip
    options = {
        "ENDS": ends is not None, "ALIBI": alibi_slopes is not None, "SINKS": sinks is not None,
        "SOFTCAP": softcap > 0, "SHARED": shared, "D1": d1, "D2": d2, "DV": dv,
    }  # fmt: skip
    exact = q.dtype == torch.float32
    large = max(d1 + d2, dv) > 256
    # decode: rows that are alone
    tile_heads = min(max(16, triton.next_power_of_2(group)), 16 if large and exact else 64)
    tile_n = (16 if exact else 32) if large else (32 if exact or max(d1 + d2, dv) > 128 else 64)
    lanes = kv_heads * triton.cdiv(group, tile_heads)
    programs = max(tokens, seqs) if max_query_len == 1 else seqs
    splits = _splits(programs * lanes, block_table.shape[1] * block_size, tile_n)
    whole = splits == 1
    fill = max_query_len == 1
    if whole:
        part = part_m = part_l = out
    else:
        part = torch.empty((seqs, heads, splits, v_dim), dtype=torch.float32, device=q.device)
        part_m, part_l = torch.empty((2, seqs, heads, splits), dtype=torch.float32, device=q.device)
    _decode[(programs, lanes, splits)](
        *tensors, part, part_m, part_l, tokens, seqs, splits, group, *strides, **options, WHOLE=whole,
        FILL=fill and whole, HEADS=tile_heads, BLOCK_N=tile_n, num_warps=8 if large else 4,
        num_stages=2 if large or exact else 3,
    )  # fmt: skip
    if not whole:
        _join[(programs, heads)](
            part, part_m, part_l, query_starts, out, tokens, seqs, splits, out.stride(0), out.stride(1), v_dim,
            FILL=fill, SPLITS=triton.next_power_of_2(splits), DV=dv,
        )  # fmt: skip
    if max_query_len > 1:
        rows = 16 if large and exact else 32 if large or exact else 64 if max(d1 + d2, dv) > 128 else 128
        tile_heads = min(triton.next_power_of_2(group), rows)
        queries = rows // tile_heads
        tile_n = 16 if large and exact else 32 if large or exact else 64
        _prefill[(tokens // queries + seqs, kv_heads * triton.cdiv(group, tile_heads))](
            *tensors, seqs, group, *strides, **options, QUERIES=queries, HEADS=tile_heads, BLOCK_N=tile_n,
            num_warps=8 if rows == 128 or large else 4, num_stages=2 if large or exact else 3,
        )  # fmt: skip
    return out


def _splits(programs: int, keys: int, tile: int) -> int:
    """Into how many parts decode cuts a context of at most `keys`, of which `programs` are worked on at a time."""
    wanted = min(PROGRAMS // max(programs, 1), triton.cdiv(keys, 2 * tile), MOST_SPLITS)
    return max(1, 1 << (wanted.bit_length() - 1)) if wanted > 0 else 1
