import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.kernels import activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
names = st.sampled_from(sorted(activation.ACTIVATIONS))


def values(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(rows, width) * 4).to(dtype)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 7), st.integers(1, 100), st.sampled_from(DTYPES), names)
def test_gated(rows: int, width: int, dtype: torch.dtype, act: str) -> None:
    x = values(rows, 2 * width, dtype)
    got = activation.gated(x, act)
    assert got.dtype == dtype
    assert got.shape == (rows, width)
    torch.testing.assert_close(got, activation.gated_reference(x, act), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 7), st.integers(1, 100), st.sampled_from(DTYPES), names)
def test_activate(rows: int, width: int, dtype: torch.dtype, act: str) -> None:
    x = values(rows, width, dtype)
    want = activation.activate_reference(x, act)
    torch.testing.assert_close(activation.activate(x, act), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    flat = activation.activate(x.flatten(), act)
    torch.testing.assert_close(flat, want.flatten(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("act", sorted(activation.ACTIVATIONS))
def test_far_values(act: str) -> None:
    x = torch.tensor([-1e30, -1000.0, -100.0, -20.0, -5.0, -0.0, 0.0, 1e-20, 5.0, 20.0, 100.0, 1000.0])
    torch.testing.assert_close(activation.activate(x, act), activation.activate_reference(x, act), rtol=1e-5, atol=1e-6)
    assert activation.activate(torch.tensor([float("nan")]), act).isnan().all()


def test_strides() -> None:
    wide = torch.randn(5, 64)
    torch.testing.assert_close(
        activation.gated(wide[:, 3:45], "silu"), activation.gated_reference(wide[:, 3:45], "silu")
    )
    torch.testing.assert_close(activation.gated(wide[:, ::2], "silu"), activation.gated_reference(wide[:, ::2], "silu"))
    torch.testing.assert_close(activation.activate(wide.T, "gelu"), activation.activate_reference(wide.T, "gelu"))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="swoosh"):
        activation.activate(torch.randn(2), "swoosh")
    with pytest.raises(ValueError, match="even"):
        activation.gated(torch.randn(2, 3), "silu")
