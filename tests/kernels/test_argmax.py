import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.kernels.argmax import argmax, argmax_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 7), st.integers(1, 3000), st.sampled_from(DTYPES), st.sampled_from((0.01, 1.0, 100.0)))
def test_argmax(rows: int, width: int, dtype: torch.dtype, spread: float) -> None:
    """Few distinct values make many equals, of which the first counts."""
    x = (torch.randn(rows, width) * spread).round(decimals=2).to(dtype)
    places, values = argmax(x)
    want_places, want_values = argmax_reference(x)
    assert torch.equal(places, want_places)
    assert torch.equal(values, want_values)
    assert values.dtype == torch.float32


def test_strides() -> None:
    wide = torch.randn(5, 640)
    for x in (wide[:, 3:601], wide[:, ::2], wide.T):
        for got, want in zip(argmax(x), argmax_reference(x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 500, 1030])
def test_values_that_are_no_numbers(dtype: torch.dtype, place: int) -> None:
    x = torch.randn(3, 1031).to(dtype)
    x[0, place], x[1, place], x[2] = float("nan"), float("inf"), -float("inf")
    places, values = argmax(x)
    assert values[0].isnan()
    assert 0 <= places[0] < 1031
    assert (places[1], values[1]) == (place, float("inf"))
    assert (places[2], values[2]) == (0, -float("inf"))
    places, values = argmax(torch.full((1, 70), float("nan")).to(dtype))
    assert values.isnan().all()
    assert 0 <= places[0] < 70


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\(3, 0\)"):
        argmax(torch.empty(3, 0))
