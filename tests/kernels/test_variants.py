"""Every instruction-set variant that this machine can run, not only the one it would choose."""

from collections.abc import Iterator

import pytest
import torch

from modelport.kernels import activation, argmax, attention, cpu, kv_cache, linear, norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
pytestmark = pytest.mark.skipif(cpu.lib is None, reason="the compiled kernels are not built")


@pytest.fixture(params=cpu.lib.available() if cpu.lib else (), autouse=True)
def variant(request: pytest.FixtureRequest) -> Iterator[None]:
    chosen = cpu.lib.isa()
    cpu.lib.isa(request.param)
    yield
    cpu.lib.isa(chosen)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=TOLERANCE[want.dtype], atol=TOLERANCE[want.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype: torch.dtype) -> None:
    for width in (1, 15, 16, 31, 64, 100):
        x, weight = torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
        close(norm.rms_norm(x, weight, 1e-6), norm.rms_norm_reference(x, weight, 1e-6))
        close(norm.rms_norm(x, weight, 1e-6, 1.0), norm.rms_norm_reference(x, weight, 1e-6, 1.0))
        close(norm.layer_norm(x, weight, weight, 1e-5), norm.layer_norm_reference(x, weight, weight, 1e-5))
        for act in set(activation.ACTIVATIONS.values()):
            both = torch.randn(3, 2 * width).to(dtype)
            close(activation.gated(both, act), activation.gated_reference(both, act))
        for got, want in zip(argmax.argmax(x.round()), argmax.argmax_reference(x.round()), strict=True):
            assert torch.equal(got, want)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40, -0.0, 65519.0, 6e-8, 3.39e38]).to(dtype)
    kept = activation.activate(special, "relu")
    assert kept[0].isnan()
    want = special.relu()
    if dtype == torch.bfloat16 and cpu.lib.isa() == "avx512bf16":
        want[3] = 0.0  # its conversion takes subnormals for zero
    assert torch.equal(kept[1:], want[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_and_cache(dtype: torch.dtype) -> None:
    for dim, rotary, interleaved in ((64, 64, False), (80, 20, False), (33, 12, True)):
        q, k, v = (torch.randn(6, heads, dim).to(dtype) for heads in (4, 2, 2))
        made = (q, k, v, torch.zeros(2, 2, 16, dim).to(dtype), torch.zeros(2, 2, 16, dim).to(dtype))
        want = [t.clone() for t in made]
        rest = (torch.arange(6), torch.randn(6, rotary), interleaved)
        slots = torch.tensor([31, 0, -1, 7, 8, 16])
        kv_cache.rope_write(*made[:3], *rest, *made[3:], slots)
        kv_cache.rope_write_reference(*want[:3], *rest, *want[3:], slots)
        for one, other in zip(made, want, strict=True):
            close(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype) -> None:
    for tokens, width, out in (
        (1, 64, 48),
        (2, 33, 17),
        (3, 64, 64),
        (5, 7, 100),
        (7, 576, 90),
        (25, 1030, 40),
        (61, 70, 130),
    ):
        x, weight = torch.randn(tokens, width).to(dtype), (torch.randn(out, width) / width**0.5).to(dtype)
        bias, residual = torch.randn(out).to(dtype), torch.randn(tokens, out).to(dtype)
        for packed in (linear.pack(weight), linear.pack_int8(weight)):
            want = x.float() @ packed.unpack().float().T + bias.float() + residual.float()
            close(linear.linear(x, packed, bias, residual), want.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (72, 40), (7, 16)])
def test_attention(dtype: torch.dtype, dim: int, v_dim: int) -> None:
    for heads, kv_heads in ((6, 2), (4, 4), (10, 1)):
        table = torch.randperm(80).int().view(4, 20)
        arguments = {
            "q": torch.randn(1 + 37 + 2 + 1, heads, dim).to(dtype),
            "k_cache": torch.randn(80, kv_heads, 16, dim).to(dtype),
            "v_cache": torch.randn(80, kv_heads, 16, v_dim).to(dtype),
            "block_table": table,
            "query_starts": torch.tensor([0, 1, 38, 40, 41], dtype=torch.int32),
            "seq_lens": torch.tensor([300, 120, 9, 1], dtype=torch.int32),
        }
        for extras in (
            {},
            {"window": 50, "softcap": 10.0, "alibi_slopes": torch.rand(heads) / 9, "sinks": torch.randn(heads)},
        ):
            options = {**arguments, **extras, "scale": dim**-0.5, "max_query_len": 37}
            close(attention.paged_attention(**options), attention.paged_attention_reference(**options))
