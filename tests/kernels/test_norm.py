import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.kernels import cpu, norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=TOLERANCE[want.dtype], atol=TOLERANCE[want.dtype])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 9), st.integers(1, 200), st.sampled_from(DTYPES), st.sampled_from((None, torch.float32)),
    st.sampled_from((0.0, 1.0)),
)  # fmt: skip
def test_rms_norm(rows: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype | None, offset: float) -> None:
    x = torch.randn(rows, width, dtype=dtype)
    weight = torch.randn(width, dtype=weight_dtype or dtype)
    close(norm.rms_norm(x, weight, 1e-5, offset), norm.rms_norm_reference(x, weight, 1e-5, offset))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(1, 200), st.sampled_from(DTYPES), st.booleans())
def test_layer_norm(rows: int, width: int, dtype: torch.dtype, with_bias: bool) -> None:
    x = torch.randn(rows, width, dtype=dtype) + 3
    weight = torch.randn(width, dtype=dtype)
    bias = torch.randn(width, dtype=dtype) if with_bias else None
    want = norm.layer_norm_reference(x, weight, bias, 1e-5)
    close(norm.layer_norm(x, weight, bias, 1e-5), want)
    wide_bias = None if bias is None else bias.float()
    close(torch.nn.functional.layer_norm(x.float(), (width,), weight.float(), wide_bias, 1e-5).to(dtype), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_heads_of_a_fused_projection(dtype: torch.dtype) -> None:
    fused = torch.randn(7, 5 * 40, dtype=dtype)
    heads = fused[:, 40:160].view(7, 3, 40)
    weight = torch.randn(40, dtype=dtype)
    close(norm.rms_norm(heads, weight, 1e-6), norm.rms_norm_reference(heads, weight, 1e-6))
    column_step = torch.randn(6, 2 * 33, dtype=dtype)[:, ::2]
    close(norm.rms_norm(column_step, weight[:33], 1e-6), norm.rms_norm_reference(column_step, weight[:33], 1e-6))


@pytest.mark.skipif(cpu.lib is None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_per_head_are_one_kernel(dtype: torch.dtype) -> None:
    heads = torch.randn(7, 5 * 40, dtype=dtype)[:, 40:160].view(7, 3, 40)
    weight, bias = torch.randn(3, 40, dtype=dtype), torch.randn(3, 40, dtype=dtype)
    out = torch.empty(heads.shape, dtype=dtype)
    assert cpu.lib.rms_norm(heads, weight, out, 1e-6, 0.0, 1)
    close(out, norm.rms_norm_reference(heads, weight, 1e-6))
    assert cpu.lib.layer_norm(heads, weight, bias, out, 1e-6, 1)
    close(out, norm.layer_norm_reference(heads, weight, bias, 1e-6))
    assert not cpu.lib.layer_norm(heads, weight, bias[0], out, 1e-6, 1)
    assert not cpu.lib.rms_norm(heads, weight[:2], out, 1e-6, 0.0, 1)


def test_many_rows_run_in_parallel() -> None:
    x, weight = torch.randn(3000, 96), torch.randn(96)
    close(norm.rms_norm(x, weight, 1e-6), norm.rms_norm_reference(x, weight, 1e-6))


def test_wrong_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        norm.rms_norm(torch.randn(2, 8), torch.randn(7), 1e-6)
    with pytest.raises(ValueError, match="bias"):
        norm.layer_norm(torch.randn(2, 8), torch.randn(8), torch.randn(7), 1e-6)
