"""Writing keys and values into the paged cache, alone or together with the rotation that precedes it.

caches: (num_blocks, kv_heads, block_size, head_dim); a slot is block * block_size + offset; slot -1 writes nothing.
A cache may be of 8-bit floats (e4m3), which hold what fits and of larger numbers their greatest.
"""

import torch
from torch import Tensor

from modelport.kernels import cpu, gpu, rope


def write_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Plain torch version of `write`."""
    block_size = k_cache.shape[2]
    if slots.numel() and int(slots.max()) >= k_cache.shape[0] * block_size:
        raise ValueError(
            f"write: slot {int(slots.max())} is outside the cache of {k_cache.shape[0] * block_size} slots"
        )
    kept = slots >= 0
    if not bool(kept.all()):
        k, v, slots = k[kept], v[kept], slots[kept]
    block, offset = slots // block_size, slots % block_size
    for new, cache in ((k, k_cache), (v, v_cache)):
        if cache.dtype == torch.float8_e4m3fn:  # beyond its greatest number it would hold NaN
            new = new.clamp(-torch.finfo(cache.dtype).max, torch.finfo(cache.dtype).max)
        cache[block, :, offset] = new.to(cache.dtype)


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
            raise ValueError(f"write: {name} {tuple(new.shape)} does not fit its cache {tuple(cache.shape)}: want "
                             "(tokens, kv_heads, dim) and (num_blocks, kv_heads, block_size, dim)")  # fmt: skip
    if k.shape[0] != v.shape[0] or slots.shape != k.shape[:1] or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"write: k {tuple(k.shape)}, v {tuple(v.shape)}, slots {tuple(slots.shape)} and caches "
                         f"{tuple(k_cache.shape)}, {tuple(v_cache.shape)} disagree")  # fmt: skip


def _dense(*tensors: Tensor) -> bool:
    """Whether neighbours in the last dimension are neighbours in memory."""
    return all(tensor.stride(-1) == 1 or not tensor.shape[-1] for tensor in tensors)


def write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Copy k, v: (tokens, kv_heads, head_dim) into their slots: (tokens,) int64 of the caches.

    k and v may be strided views of a fused projection; their head_dims may differ.
    """
    on_gpu = gpu.takes(k)
    if not on_gpu and cpu.lib is not None and cpu.lib.cache_write(k, v, k_cache, v_cache, slots, cpu.threads()):
        return
    _check(k, v, k_cache, v_cache, slots)
    if on_gpu and _dense(k, v, k_cache, v_cache):
        return gpu.rope.rope_write(None, k, v, None, None, False, k_cache, v_cache, slots)
    write_reference(k, v, k_cache, v_cache, slots)


def rope_write(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor,
) -> None:  # fmt: skip
    """Rotate q: (tokens, heads, head_dim) and k: (tokens, kv_heads, head_dim) in place, and write k and v to the cache.

    Arguments as in `rope.rotate_` and `write`; one pass over the three.
    """
    on_gpu = gpu.takes(k)
    if (
        not on_gpu
        and cpu.lib is not None
        and cpu.lib.rope_write(q, k, v, positions, cos_sin, interleaved, k_cache, v_cache, slots, cpu.threads())
    ):
        return
    rope.check_rotation(q, positions, cos_sin)
    rope.check_rotation(k, positions, cos_sin)
    _check(k, v, k_cache, v_cache, slots)
    if on_gpu and _dense(q, k, v, k_cache, v_cache):
        return gpu.rope.rope_write(q, k, v, positions, cos_sin, interleaved, k_cache, v_cache, slots)
    rope_write_reference(q, k, v, positions, cos_sin, interleaved, k_cache, v_cache, slots)
