"""Writing keys and values into the paged cache, alone or together with the rotation that precedes it.

caches: (num_blocks, kv_heads, block_size, head_dim); a slot is block * block_size + offset; slot -1 writes nothing.
"""

import torch
from torch import Tensor

from modelport.kernels import cpu, rope


def write_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Plain torch version of `write`."""
    block_size = k_cache.shape[2]
    if slots.numel() and int(slots.max()) >= k_cache.shape[0] * block_size:
        raise ValueError(f"write: slot {int(slots.max())} is outside the cache of {k_cache.shape[0] * block_size} slots")
    kept = slots >= 0
    if not bool(kept.all()):
        k, v, slots = k[kept], v[kept], slots[kept]
    block, offset = slots // block_size, slots % block_size
    k_cache[block, :, offset] = k.to(k_cache.dtype)
    v_cache[block, :, offset] = v.to(v_cache.dtype)


def rope_write_reference(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor,
) -> None:  # fmt: skip
    """Plain torch version of `rope_write`."""
    rope.rotate_reference(q, positions, cos_sin, interleaved)
    rope.rotate_reference(k, positions, cos_sin, interleaved)
    write_reference(k, v, k_cache, v_cache, slots)


def _check(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.dim() != 3 or cache.dim() != 4 or new.shape[1] != cache.shape[1] or new.shape[2] != cache.shape[3]:
            raise ValueError(f"write: {name} {tuple(new.shape)} does not fit its cache {tuple(cache.shape)}: want (tokens, "
                             "kv_heads, head_dim) and (num_blocks, kv_heads, block_size, head_dim)")  # fmt: skip
    if k.shape[0] != v.shape[0] or slots.shape != k.shape[:1] or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"write: k {tuple(k.shape)}, v {tuple(v.shape)}, slots {tuple(slots.shape)} and caches "
                         f"{tuple(k_cache.shape)}, {tuple(v_cache.shape)} disagree")  # fmt: skip


def _fits(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> bool:
    return (
        cpu.lib is not None
        and k.dtype in cpu.FLOATS
        and k.dtype == v.dtype == k_cache.dtype == v_cache.dtype
        and k.is_cpu and v.is_cpu and k_cache.is_cpu and v_cache.is_cpu and slots.is_cpu
        and k.stride(2) == 1 and v.stride(2) == 1 and k_cache.stride(3) == 1 and v_cache.stride(3) == 1
        and slots.dtype == torch.int64
        and slots.is_contiguous()
    )  # fmt: skip


def write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Copy k, v: (tokens, kv_heads, head_dim) into their slots: (tokens,) int64 of the caches.

    k and v may be strided views of a fused projection; their head_dims may differ.
    """
    _check(k, v, k_cache, v_cache, slots)
    if _fits(k, v, k_cache, v_cache, slots):
        cpu.lib.rope_write(
            0, 0, 0, 0,
            k.data_ptr(), k.stride(0), k.stride(1), v.data_ptr(), v.stride(0), v.stride(1),
            k.shape[0], k.shape[1], k.shape[2], v.shape[2], 0, 0, 0, 0, 0,
            k_cache.data_ptr(), *k_cache.stride()[:3], v_cache.data_ptr(), *v_cache.stride()[:3],
            k_cache.shape[0], k_cache.shape[2], slots.data_ptr(), cpu.CODES[k.dtype], cpu.threads(),
        )  # fmt: skip
    else:
        write_reference(k, v, k_cache, v_cache, slots)


def rope_write(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor,
) -> None:  # fmt: skip
    """Rotate q: (tokens, heads, head_dim) and k: (tokens, kv_heads, head_dim) in place, and write k and v to the cache.

    Arguments as in `rope.rotate_` and `write`; one pass over the three.
    """
    rope.check_rotation(q, positions, cos_sin)
    rope.check_rotation(k, positions, cos_sin)
    _check(k, v, k_cache, v_cache, slots)
    if rope.kernel_fits(q, positions, cos_sin) and q.dtype == k.dtype and _fits(k, v, k_cache, v_cache, slots):
        cpu.lib.rope_write(
            q.data_ptr(), q.stride(0), q.stride(1), q.shape[1],
            k.data_ptr(), k.stride(0), k.stride(1), v.data_ptr(), v.stride(0), v.stride(1),
            k.shape[0], k.shape[1], k.shape[2], v.shape[2],
            positions.data_ptr(), cos_sin.data_ptr(), cos_sin.shape[0], cos_sin.shape[1], int(interleaved),
            k_cache.data_ptr(), *k_cache.stride()[:3], v_cache.data_ptr(), *v_cache.stride()[:3],
            k_cache.shape[0], k_cache.shape[2], slots.data_ptr(), cpu.CODES[k.dtype], cpu.threads(),
        )  # fmt: skip
    else:
        rope_write_reference(q, k, v, positions, cos_sin, interleaved, k_cache, v_cache, slots)
