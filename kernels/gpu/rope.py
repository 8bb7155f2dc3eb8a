"""Rotation in place, and together with writing keys and values to the paged cache: one pass over q, k and v.

Legend: a program has one token and HEADS heads, of q or of k and v; half: rotated pairs of a head.
"""

import triton
import triton.language as tl
from torch import Tensor

HEADS = 4


@triton.jit
def _narrow(value, KIND: tl.constexpr):
    """In the cache's type; what is too large for 8 bits becomes their greatest number."""
    if KIND == tl.float8e4nv:
        value = tl.minimum(tl.maximum(value.to(tl.float32), -448.0), 448.0)
    return value.to(KIND)


@triton.jit
def _turn(x, angles, base, half, mask, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """Rotate the heads at x + base, (HEADS, 1); -> both members of each pair, and where they lie in a head."""
    pair = tl.arange(0, HALF)[None, :]
    mask = mask & (pair < half)
    cos = tl.load(angles + pair, mask=pair < half, other=0.0)
    sin = tl.load(angles + half + pair, mask=pair < half, other=0.0)
    first = 2 * pair if INTERLEAVED else pair
    second = first + (1 if INTERLEAVED else half)
    a = tl.load(x + base + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + base + second, mask=mask, other=0.0).to(tl.float32)
    left, right = (a * cos - b * sin).to(x.dtype.element_ty), (b * cos + a * sin).to(x.dtype.element_ty)
    tl.store(x + base + first, left, mask=mask)
    tl.store(x + base + second, right, mask=mask)
    return left, right, first, second, mask


@triton.jit
def _copy(x, base, cache, place, start, width, mask, BLOCK: tl.constexpr):
    """Columns [start, width) of heads into the cache."""
    column = start + tl.arange(0, BLOCK)[None, :]
    mask = mask & (column < width)
    value = tl.load(x + base + column, mask=mask, other=0.0)
    tl.store(cache + place + column, _narrow(value, cache.dtype.element_ty), mask=mask)


@triton.jit
def _rope_write(
    q, k, v, positions, cos_sin, k_cache, v_cache, slots, heads, kv_heads, half, q_token, q_head, k_token, k_head,
    v_token, v_head, k_block, k_cache_head, k_slot, v_block, v_cache_head, v_slot, block_size, num_slots, k_dim, v_dim,
    ROTATE: tl.constexpr, WRITE: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_q = tl.cdiv(heads, HEADS)
    head = tl.arange(0, HEADS)[:, None]
    angles = cos_sin
    if ROTATE:
        angles += tl.load(positions + token) * 2 * half
    if tile < of_q:
        head += tile * HEADS
        _turn(q, angles, token * q_token + head * q_head, half, head < heads, INTERLEAVED, HALF)
    else:
        head += (tile - of_q) * HEADS
        mask = head < kv_heads
        from_k = token * k_token + head * k_head
        slot = tl.load(slots + token)
        block = slot // block_size
        offset = slot - block * block_size
        written = mask & (slot >= 0) & (slot < num_slots)
        to_k = block * k_block + head * k_cache_head + offset * k_slot
        rotated = 0
        if ROTATE:
            left, right, first, second, there = _turn(k, angles, from_k, half, mask, INTERLEAVED, HALF)
            tl.store(k_cache + to_k + first, _narrow(left, k_cache.dtype.element_ty), mask=there & written)
            tl.store(k_cache + to_k + second, _narrow(right, k_cache.dtype.element_ty), mask=there & written)
            rotated = 2 * half
        if WRITE:
            _copy(k, from_k, k_cache, to_k, rotated, k_dim, written, K_BLOCK)
            to_v = block * v_block + head * v_cache_head + offset * v_slot
            _copy(v, token * v_token + head * v_head, v_cache, to_v, 0, v_dim, written, V_BLOCK)


def rotate_(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    """As `modelport.kernels.rope.rotate_`; the last dimension of x is dense."""
    if not x.numel():
        return
    half = cos_sin.shape[1] // 2
    _rope_write[(x.shape[0], triton.cdiv(x.shape[1], HEADS))](
        x, x, x, positions, cos_sin.contiguous(), x, x, positions, x.shape[1], 0, half, x.stride(0), x.stride(1),
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, ROTATE=True, WRITE=False, INTERLEAVED=interleaved, HEADS=HEADS,
        HALF=triton.next_power_of_2(half), K_BLOCK=1, V_BLOCK=1, num_warps=1,
    )  # fmt: skip


def rope_write(
    q: Tensor | None, k: Tensor, v: Tensor, positions: Tensor | None, cos_sin: Tensor | None, interleaved: bool,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor,
) -> None:  # fmt: skip
    """As `modelport.kernels.kv_cache.rope_write`; without `cos_sin`, as `write`. Last dimensions are dense."""
    tokens, kv_heads, k_dim = k.shape
    if not tokens:
        return
    v_dim, half = v.shape[2], 0 if cos_sin is None else cos_sin.shape[1] // 2
    heads = 0 if q is None else q.shape[1]
    q = k if q is None else q
    _rope_write[(tokens, triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS))](
        q, k, v, slots if positions is None else positions, k if cos_sin is None else cos_sin.contiguous(),
        k_cache, v_cache, slots, heads, kv_heads, half, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3], k_cache.shape[2],
        k_cache.shape[0] * k_cache.shape[2], k_dim, v_dim, ROTATE=cos_sin is not None, WRITE=True,
        INTERLEAVED=interleaved, HEADS=HEADS, HALF=triton.next_power_of_2(max(half, 1)),
        K_BLOCK=triton.next_power_of_2(max(k_dim - 2 * half, 1)), V_BLOCK=triton.next_power_of_2(max(v_dim, 1)),
        num_warps=1 if k_dim <= 128 else 4,
    )  # fmt: skip
