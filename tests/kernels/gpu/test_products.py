"""Products: weights of 8 bits, experts, adapters."""

import os

import pytest
import torch

from modelport.kernels import gpu, linear, lora, moe

ON_CPU = os.environ.get("MODELPORT_TEST_DEVICE", "cpu") == "cpu"
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
if not ON_CPU:  # the interpreter only pretends to compute with bfloat16
    DTYPES.append(torch.bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    scale = float(want.float().abs().max()) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=TOLERANCE[want.dtype], atol=TOLERANCE[want.dtype] * max(scale, 1.0))


@pytest.fixture(autouse=True)
def _plain_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights lie as on a GPU: as they are."""
    monkeypatch.setattr(linear.cpu, "lib", None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inner", "outer"), [(0, 8, 8), (1, 33, 17), (20, 300, 70), (130, 16, 5)])
def test_int8(tokens: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, 2 * inner).to(dtype)[:, inner:]
    packed = linear.pack_int8(torch.randn(outer, inner))
    bias, residual = torch.randn(outer).to(dtype), torch.randn(tokens, outer).to(dtype)
    for extra in ((), (bias,), (None, residual), (bias, residual)):
        close(linear.linear(x, packed, *extra), linear.linear_reference(x, packed, *extra))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_other_types(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 64).to(dtype), torch.randn(40, 64)
    small = weight.to(torch.float8_e4m3fn)
    close(gpu.linear.linear(x, small, torch.full((40,), 0.5)), (x.float() @ small.float().T * 0.5).to(dtype))
    close(gpu.linear.linear(x, weight.to(dtype), None), x @ weight.to(dtype).T)


def weights(count: int, hidden: int, width: int, dtype: torch.dtype, packer, bias: bool) -> tuple:
    gate_up, down = (
        torch.randn(count, 2, width, hidden) / hidden**0.5,
        torch.randn(count, 1, hidden, width) / width**0.5,
    )
    biases = [torch.randn(count, 2, width), torch.randn(count, 1, hidden)] if bias else [None, None]
    return tuple(moe.pack(w.to(dtype), b, packer) for w, b in zip((gate_up, down), biases, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "count", "chosen", "hidden", "width"),
    [(1, 4, 2, 32, 17), (7, 5, 3, 33, 40), (70, 3, 1, 16, 24), (0, 2, 1, 8, 8)],
)
def test_experts(tokens: int, count: int, chosen: int, hidden: int, width: int, dtype: torch.dtype) -> None:
    gate_up, down = weights(count, hidden, width, dtype, linear.pack, bias=False)
    x, residual = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens, hidden).to(dtype)
    ids = torch.rand(tokens, count).argsort(-1)[:, :chosen].contiguous()
    shares = torch.rand(tokens, chosen)
    given = (x, ids, shares, gate_up, down, "silu")
    close(moe.experts(*given), moe.experts_reference(*given))
    ids[::2] = -1  # they lie elsewhere
    close(moe.experts(*given, residual), moe.experts_reference(*given, residual))


@pytest.mark.parametrize("tokens", [1, 9])
def test_what_adapters_of_experts_need(tokens: int) -> None:
    gate_up, down = weights(4, 33, 40, torch.float32, linear.pack, bias=True)
    x, ids, shares = torch.randn(tokens, 33), torch.randint(-1, 4, (tokens, 3)), torch.rand(tokens, 3)
    extra = torch.randn(tokens, 3, 2, 40)
    got_inner, want_inner = torch.zeros(tokens, 3, 40), torch.zeros(tokens, 3, 40)
    got = moe.experts(x, ids, shares, gate_up, down, "silu", None, extra, got_inner)
    close(got, moe.experts_reference(x, ids, shares, gate_up, down, "silu", None, extra, want_inner))
    close(got_inner, want_inner)


def test_eight_bit_floats_from_packing_to_product() -> None:
    x, weight = torch.randn(5, 64), torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    packed = linear.pack_fp8(weight)
    close(linear.linear(x, packed), linear.linear_reference(x, packed))
    error = (packed.unpack() - weight).abs().amax(1) / weight.abs().amax(1)
    assert 0 < error.max() <= 16 / 448 + 1e-6  # half a step where the greatest lie, whatever a row's size
    gate_up, down = weights(3, 32, 24, torch.float32, linear.pack_fp8, bias=False)
    x, ids, shares = torch.randn(6, 32), torch.randint(0, 3, (6, 2)), torch.rand(6, 2)
    close(
        moe.experts(x, ids, shares, gate_up, down, "silu"), moe.experts_reference(x, ids, shares, gate_up, down, "silu")
    )


@pytest.mark.parametrize("act", ["gelu_tanh", "relu2", moe.SwigluOAI(limit=0.5)])
def test_experts_of_small_weights_with_biases(act: str | moe.SwigluOAI) -> None:
    gate_up, down = weights(4, 32, 24, torch.float32, linear.pack_int8, bias=True)
    x, ids, shares = torch.randn(6, 32), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    close(moe.experts(x, ids, shares, gate_up, down, act), moe.experts_reference(x, ids, shares, gate_up, down, act))


@pytest.mark.parametrize(("choices", "experts"), [(1, 1), (40, 3), (300, 60)])
def test_both_ways_of_sorting_agree(choices: int, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(-1, experts, (choices, 1))
    kernel = gpu.moe.route(ids, experts, 16)
    monkeypatch.setattr(gpu.moe, "FEW", 0)
    library = gpu.moe.route(ids, experts, 16)
    valid = int((ids >= 0).sum())
    assert torch.equal(kernel[0][:valid], library[0][:valid])
    assert torch.equal(kernel[1], library[1])
    assert torch.equal(kernel[2], library[2])
    assert torch.equal(ids[kernel[0][:valid].long(), 0], ids[ids >= 0].sort().values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "slots", "rank"), [(0, 2, 4), (1, 1, 1), (37, 3, 8), (300, 2, 20)])
def test_lora(tokens: int, slots: int, rank: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(tokens, 150).to(dtype), torch.randn(tokens, 2 * 140).to(dtype)[:, 140:]
    a, b = (torch.randn(slots, rank, 150) / 12).to(dtype), torch.randn(slots, rank, 140).to(dtype)
    rows = torch.randint(-1, slots, (tokens,), dtype=torch.int32)
    for added in (None, residual):
        want = torch.zeros(tokens, 140) if added is None else added.float().clone()
        for row, slot in enumerate(rows.tolist()):
            if slot >= 0:
                want[row] = want[row] + x[row].float() @ a[slot].float().T @ b[slot].float()
        close(gpu.lora.lora(x, rows, a, b, added), want.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_of_parts(dtype: torch.dtype) -> None:
    x, out = torch.randn(9, 40).to(dtype), torch.randn(9, 50).to(dtype)
    a, b = torch.randn(2, 3 * 4, 40).to(dtype) / 6, torch.randn(2, 4, 50).to(dtype)
    made = lora.LowRank(a, b, torch.tensor([4, 4], dtype=torch.int32), (0, 20, 35, 50))
    slots = torch.randint(-1, 2, (9,), dtype=torch.int32)
    got, want = out.clone(), out.clone()
    lora.lora_(got, x, slots, made)
    lora.lora_reference_(want, x, slots, made)
    close(got, want)
