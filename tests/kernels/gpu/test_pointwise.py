"""Norms, activations, rotation and cache writes against their references."""

import pytest
import torch

from modelport.kernels import activation, kv_cache, norm, rope

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=TOLERANCE[want.dtype], atol=TOLERANCE[want.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (9, 33), (17, 64), (3, 2500)])
def test_norms(rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, width).to(dtype) + 3
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    for offset in (0.0, 1.0):
        close(norm.rms_norm(x, weight, 1e-5, offset), norm.rms_norm_reference(x, weight, 1e-5, offset))
    wide = weight.float()
    close(norm.rms_norm(x, wide, 1e-5), norm.rms_norm_reference(x, wide, 1e-5))
    close(norm.layer_norm(x, weight, bias, 1e-5), norm.layer_norm_reference(x, weight, bias, 1e-5))
    close(norm.layer_norm(x, weight, None, 1e-5), norm.layer_norm_reference(x, weight, None, 1e-5))


def test_norms_of_heads_within_a_fused_projection() -> None:
    heads = torch.randn(5, 5 * 40)[:, 40:160].view(5, 3, 40)
    for weight in (torch.randn(40), torch.randn(3, 40)):
        close(norm.rms_norm(heads, weight, 1e-6), norm.rms_norm_reference(heads, weight, 1e-6))
        close(norm.layer_norm(heads, weight, weight, 1e-6), norm.layer_norm_reference(heads, weight, weight, 1e-6))
    every_other = torch.randn(6, 66)[:, ::2]
    close(norm.rms_norm(every_other, weight[0, :33], 1e-6), norm.rms_norm_reference(every_other, weight[0, :33], 1e-6))
    with pytest.raises(ValueError, match="weight"):
        norm.rms_norm(heads, torch.randn(39), 1e-6)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(act: str, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 2200) * 3).to(dtype)
    close(activation.activate(x[:, 7:9], act), activation.activate_reference(x[:, 7:9], act))
    close(activation.activate(x, act), activation.activate_reference(x, act))
    for part in (x, x[:, 2:60], x[:0], x.view(3, 2, 1100)):
        close(activation.gated(part, act), activation.gated_reference(part, act))


def make(tokens: int, heads: int, kv_heads: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> tuple:
    """q, k, v, k_cache, v_cache, slots; some slots are -1."""
    fused = torch.randn(tokens, heads * k_dim + kv_heads * (k_dim + v_dim)).to(dtype)
    q, k, v = fused.split((heads * k_dim, kv_heads * k_dim, kv_heads * v_dim), 1)
    k_cache = torch.full((tokens + 3, kv_heads, 4, k_dim), -777.0).to(dtype)
    v_cache = torch.full((tokens + 3, kv_heads, 4, v_dim), -777.0).to(dtype)
    slots = torch.randperm(4 * (tokens + 3))[:tokens]
    slots[1::3] = -1
    q, k, v = q.view(tokens, heads, k_dim), k.view(tokens, kv_heads, k_dim), v.view(tokens, kv_heads, v_dim)
    return q, k, v, k_cache, v_cache, slots


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "half", "rest", "v_dim"),
    [(0, 1, 1, 2, 0, 4), (5, 6, 2, 4, 0, 8), (4, 7, 7, 5, 3, 9), (3, 1, 1, 1, 30, 1)],
)
def test_rope_write(
    tokens: int, heads: int, kv_heads: int, half: int, rest: int, v_dim: int, dtype: torch.dtype, interleaved: bool
) -> None:
    made = make(tokens, heads, kv_heads, 2 * half + rest, v_dim, dtype)
    want = [t.clone() for t in made]
    positions, cos_sin = torch.randint(0, 64, (tokens,)), torch.randn(64, 2 * half)
    for function, (q, k, v, *rest_of) in ((kv_cache.rope_write, made), (kv_cache.rope_write_reference, want)):
        function(q, k, v, positions, cos_sin, interleaved, *rest_of)
    for got, reference in zip(made[:5], want[:5], strict=True):
        close(got, reference)
    fused, cos_sin = torch.randn(tokens, 96).to(dtype), torch.randn(64, 8)
    same = fused.clone()
    for function, x in ((rope.rotate_, fused), (rope.rotate_reference, same)):
        function(x[:, 16:76].view(tokens, 5, 12), positions, cos_sin, interleaved)
    close(fused, same)  # and nothing outside the view


@pytest.mark.parametrize("dtype", DTYPES)
def test_write(dtype: torch.dtype) -> None:
    _, *made = make(7, 1, 3, 33, 5, dtype)
    want = [t.clone() for t in made]
    kv_cache.write(*made)
    kv_cache.write_reference(*want)
    for got, reference in zip(made, want, strict=True):
        assert torch.equal(got, reference)
    k, _, cache, _, slots = made
    kv_cache.write(k + 1, k[..., :0], cache, cache[..., :0], slots)  # latents: no values
    kv_cache.write_reference(k + 1, k[..., :0], want[2], want[2][..., :0], slots)
    assert torch.equal(cache, want[2])


def test_write_to_eight_bit_floats() -> None:
    _, k, v, *caches, slots = make(7, 1, 3, 16, 8, torch.float32)
    for new in (k, v):
        new.copy_(new.to(torch.float8_e4m3fn))  # of numbers between these the interpreter rounds some wrongly
    k[:2] = 1e4 * k[:2].sign()  # beyond 448, the greatest
    small = [torch.zeros(cache.shape).to(torch.float8_e4m3fn) for cache in caches]
    want = [torch.zeros(cache.shape).to(torch.float8_e4m3fn) for cache in caches]
    kv_cache.write(k, v, *small, slots)
    kv_cache.write_reference(k, v, *want, slots)
    for got, reference in zip(small, want, strict=True):
        assert torch.equal(got.float(), reference.float())
