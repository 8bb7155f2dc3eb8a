import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.kernels import kv_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POISON = -777.0


def cos_sin_table(rotary: int) -> torch.Tensor:
    return torch.randn(64, rotary)


def make(tokens: int, heads: int, kv_heads: int, k_dim: int, v_dim: int, block_size: int, dtype: torch.dtype):
    fused = torch.randn(tokens, heads * k_dim + kv_heads * (k_dim + v_dim), dtype=dtype)
    q, k, v = fused.split((heads * k_dim, kv_heads * k_dim, kv_heads * v_dim), 1)
    blocks = -(-tokens // block_size) + 3
    k_cache = torch.full((blocks, kv_heads, block_size, k_dim), POISON, dtype=dtype)
    v_cache = torch.full((blocks, kv_heads, block_size, v_dim), POISON, dtype=dtype)
    slots = torch.randperm(blocks * block_size)[:tokens]
    slots[torch.rand(tokens) < 0.2] = -1
    return (
        q.view(tokens, heads, k_dim), k.view(tokens, kv_heads, k_dim), v.view(tokens, kv_heads, v_dim),
        k_cache, v_cache, slots,
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 20), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 17),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_write(tokens: int, kv_heads: int, k_dim: int, v_dim: int, block_size: int, dtype: torch.dtype) -> None:
    _, k, v, k_cache, v_cache, slots = make(tokens, 1, kv_heads, k_dim, v_dim, block_size, dtype)
    k_want, v_want = k_cache.clone(), v_cache.clone()
    kv_cache.write(k, v, k_cache, v_cache, slots)
    kv_cache.write_reference(k, v, k_want, v_want, slots)
    assert torch.equal(k_cache, k_want)
    assert torch.equal(v_cache, v_want)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 20), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 9),
    st.integers(1, 40), st.booleans(), st.sampled_from(DTYPES),
)  # fmt: skip
def test_rope_write(
    tokens: int, kv_heads: int, group: int, half: int, rest: int, v_dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    made = make(tokens, kv_heads * group, kv_heads, 2 * half + rest, v_dim, 16, dtype)
    want = [t.clone() for t in made]
    positions, cos_sin = torch.randint(0, 64, (tokens,)), cos_sin_table(2 * half)
    q, k, v, k_cache, v_cache, slots = made
    kv_cache.rope_write(q, k, v, positions, cos_sin, interleaved, k_cache, v_cache, slots)
    q, k, v, k_cache, v_cache, slots = want
    kv_cache.rope_write_reference(q, k, v, positions, cos_sin, interleaved, k_cache, v_cache, slots)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for one, other in zip(made, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_caches_that_share_one_tensor() -> None:
    both = torch.full((4, 2, 3, 16, 8), POISON)
    k, v = torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    slots = torch.tensor([0, 17, 63, -1, 40])
    want = both.clone()
    kv_cache.write(k, v, both[:, 0], both[:, 1], slots)
    kv_cache.write_reference(k, v, want[:, 0], want[:, 1], slots)
    assert torch.equal(both, want)


def test_refusals() -> None:
    _, k, v, k_cache, v_cache, slots = make(4, 1, 2, 8, 8, 4, torch.float32)
    with pytest.raises(ValueError, match="slot"):
        kv_cache.write(k, v, k_cache, v_cache, slots.fill_(k_cache.shape[0] * 4))
    slots.fill_(-1)
    with pytest.raises(ValueError, match="k "):
        kv_cache.write(k[..., :7], v, k_cache, v_cache, slots)
    with pytest.raises(ValueError, match="disagree"):
        kv_cache.write(k, v, k_cache, v_cache[:, :, :3], slots)
