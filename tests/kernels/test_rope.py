import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.kernels import cpu, rope

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def table(positions: int, rotary: int) -> torch.Tensor:
    angles = torch.outer(torch.arange(positions).float(), 10000.0 ** (-torch.arange(0, rotary, 2) / rotary))
    return torch.cat((angles.cos(), angles.sin()), 1)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 9), st.integers(1, 5), st.integers(1, 40), st.integers(0, 17), st.booleans(), st.sampled_from(DTYPES)
)
def test_rotate(tokens: int, heads: int, half: int, rest: int, interleaved: bool, dtype: torch.dtype) -> None:
    dim = 2 * half + rest
    fused = torch.randn(tokens, (heads + 2) * dim, dtype=dtype)
    want = fused.clone()
    positions = torch.randint(0, 50, (tokens,))
    cos_sin = table(50, 2 * half)
    rope.rotate_(fused[:, dim : (heads + 1) * dim].view(tokens, heads, dim), positions, cos_sin, interleaved)
    rope.rotate_reference(want[:, dim : (heads + 1) * dim].view(tokens, heads, dim), positions, cos_sin, interleaved)
    # also: nothing outside the view was touched
    torch.testing.assert_close(fused, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_known_angles() -> None:
    x = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])
    cos_sin = torch.tensor([[0.0, 1.0, 1.0, 0.0]])  # a quarter turn of the first pair, none of the second
    half_split, neighbours = x.clone(), x.clone()
    rope.rotate_(half_split, torch.tensor([0]), cos_sin)
    rope.rotate_(neighbours, torch.tensor([0]), cos_sin, interleaved=True)
    assert half_split.tolist() == [[[0.0, 0.0, 1.0, 1.0]]]
    assert neighbours.tolist() == [[[0.0, 1.0, 0.0, 1.0]]]


def test_other_strides_and_index_types_fall_back() -> None:
    x = torch.randn(3, 8, 2).transpose(1, 2)
    want = x.clone()
    rope.rotate_(x, torch.tensor([4, 0, 2], dtype=torch.int32), table(5, 8))
    rope.rotate_reference(want, torch.tensor([4, 0, 2]), table(5, 8))
    torch.testing.assert_close(x, want)


def test_refusals() -> None:
    x = torch.randn(2, 1, 8)
    with pytest.raises(ValueError, match="rotary_dim"):
        rope.rotate_(x, torch.zeros(2, dtype=torch.int64), table(4, 10))
    with pytest.raises(ValueError, match="positions"):
        rope.rotate_(x, torch.zeros(3, dtype=torch.int64), table(4, 8))
    for wrong in (4, -1) if cpu.lib else (4,):  # torch takes -1 as the last row
        with pytest.raises((ValueError, IndexError)):
            rope.rotate_(x, torch.tensor([0, wrong]), table(4, 8))
