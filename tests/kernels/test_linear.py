import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modelport.kernels import linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 4e-3}


@settings(deadline=None, max_examples=80)
@given(
    st.one_of(st.integers(0, 14), st.integers(15, 70)), st.integers(1, 90), st.integers(1, 90), st.sampled_from(DTYPES),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_linear(tokens: int, width: int, out: int, dtype: torch.dtype, with_bias: bool, with_residual: bool) -> None:
    x = torch.randn(tokens, width).to(dtype)
    weight = (torch.randn(out, width) / width**0.5).to(dtype)
    bias = torch.randn(out).to(dtype) if with_bias else None
    residual = torch.randn(tokens, out).to(dtype) if with_residual else None
    packed = linear.pack(weight)
    want = x.float() @ weight.float().T
    want = want if bias is None else want + bias.float()
    want = (want if residual is None else want + residual.float()).to(dtype)
    got = linear.linear(x, packed, bias, residual)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    reference = linear.linear_reference(x, packed, bias, residual)
    torch.testing.assert_close(reference, want, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 200])
def test_larger(tokens: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(tokens, 576).to(dtype), (torch.randn(1000, 576) / 24).to(dtype)
    want = (x.float() @ weight.float().T).to(dtype)
    got = linear.linear(x, linear.pack(weight))
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 20), st.integers(1, 90), st.integers(1, 90), st.sampled_from(DTYPES), st.booleans())
def test_int8(tokens: int, width: int, out: int, dtype: torch.dtype, extras: bool) -> None:
    x, weight = torch.randn(tokens, width).to(dtype), torch.randn(out, width) / width**0.5
    bias, residual = (torch.randn(out).to(dtype), torch.randn(tokens, out).to(dtype)) if extras else (None, None)
    packed = linear.pack_int8(weight)
    assert packed.dtype == torch.int8
    kept = packed.unpack()
    assert ((kept - weight).abs() <= packed.scales[:, None] * 0.501).all()
    want = x.float() @ kept.T
    want = (want + bias.float() + residual.float() if extras else want).to(dtype)
    got = linear.linear(x, packed, bias, residual)
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    reference = linear.linear_reference(x, packed, bias, residual)
    torch.testing.assert_close(reference, want, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_int8_keeps_what_the_rows_say(tokens: int, dtype: torch.dtype) -> None:
    """Rows become int16 on the way: values far apart in one row must not drown each other."""
    x = torch.randn(tokens, 1000)
    x[:, 5::100] *= 500
    x, packed = x.to(dtype), linear.pack_int8(torch.randn(80, 1000))
    want = x.double() @ packed.unpack().double().T
    got = linear.linear(x, packed).double()
    rounding = 8e-3 if dtype == torch.bfloat16 else 1e-3  # of the result to its dtype; the reference does it twice
    torch.testing.assert_close(got, want, rtol=rounding, atol=3e-4 * want.abs().max().item())
    small = (x * 1e-3).to(dtype)
    small[:, 5::100] = 0
    want = small.double() @ packed.unpack().double().T
    torch.testing.assert_close(linear.linear(small, packed), want.to(dtype), rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_int8_does_not_hide_what_is_not_finite(bad: float) -> None:
    x, packed = torch.randn(5, 300).bfloat16(), linear.pack_int8(torch.randn(40, 300))
    x[2, 150] = bad
    got = linear.linear(x, packed)
    assert not got[2].isfinite().any()
    assert got[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("quantised", [False, True])
def test_any_number_of_threads(quantised: bool) -> None:
    x, weight = torch.randn(3, 576).bfloat16(), torch.randn(1000, 576).bfloat16()
    packed = linear.pack_int8(weight) if quantised else linear.pack(weight)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7, 100):
            torch.set_num_threads(threads)
            results.append(linear.linear(x, packed))
    finally:
        torch.set_num_threads(before)
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (48, 33), (100, 64)])
def test_packed_weight_still_serves_as_a_table(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = linear.pack(weight)
    assert torch.equal(packed.unpack(), weight)
    ids = torch.randint(0, shape[0], (9,))
    assert torch.equal(packed.rows(ids), weight[ids])
    assert packed.nbytes <= weight.element_size() * (shape[0] + 15) * (shape[1] + 1)


def test_strided_rows_and_residual() -> None:
    wide, weight = torch.randn(9, 100), torch.randn(30, 40)
    residual = torch.randn(9, 64)[:, 3:33]
    packed = linear.pack(weight)
    for x in (wide[:, 7:47], wide[:, 20:].T[:40].T, torch.randn(9, 80)[:, ::2]):
        want = F.linear(x, weight) + residual
        torch.testing.assert_close(linear.linear(x, packed, None, residual), want, rtol=1e-5, atol=1e-4)


def test_zero_weight_rows_quantise() -> None:
    packed = linear.pack_int8(torch.zeros(3, 8))
    assert torch.equal(linear.linear(torch.randn(2, 8), packed), torch.zeros(2, 3))


def test_refusals() -> None:
    packed = linear.pack(torch.randn(6, 4))
    with pytest.raises(ValueError, match="tokens"):
        linear.linear(torch.randn(2, 5), packed)
    with pytest.raises(ValueError, match="convert"):
        linear.linear(torch.randn(2, 4).bfloat16(), packed)
    with pytest.raises(ValueError, match="bias"):
        linear.linear(torch.randn(2, 4), packed, torch.randn(5))
    with pytest.raises(ValueError, match="residual"):
        linear.linear(torch.randn(2, 4), packed, None, torch.randn(2, 5))
    with pytest.raises(ValueError, match="pack"):
        linear.pack(torch.zeros(3, 4, dtype=torch.int64))
