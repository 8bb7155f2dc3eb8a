import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as build_falcon_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from modelport.modeling import Alibi

HEADS = [1, 2, 3, 5, 6, 7, 8, 12, 16, 20, 24, 40, 71, 112]


def slopes(heads: int, **settings: float) -> torch.Tensor:
    alibi = Alibi(heads, **settings)
    alibi.build_tables(torch.device("cpu"), 64)
    return alibi.slopes


@pytest.mark.parametrize("heads", HEADS)
def test_bloom(heads: int) -> None:
    bias = build_alibi_tensor(torch.ones(1, 9), heads, torch.float32)[:, 0]  # (heads, keys)
    torch.testing.assert_close(slopes(heads), bias[:, 1], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("max_bias", [4.0, 8.0, 16.0])
@pytest.mark.parametrize("heads", HEADS)
def test_mpt(heads: int, max_bias: float) -> None:
    bias = build_mpt_alibi_tensor(heads, 9, max_bias)[:, 0]
    torch.testing.assert_close(slopes(heads, max_bias=max_bias), -bias[:, -2], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("heads", [4, 8, 71])
def test_falcon_scales_biases_with_scores(heads: int) -> None:
    """Its code rounds slopes to bfloat16, its model was not trained so; the difference stays below that rounding."""
    bias = build_falcon_alibi_tensor(torch.ones(1, 9), heads, torch.float32)[:, 0] * 64**-0.5
    torch.testing.assert_close(slopes(heads, scale=64**-0.5), bias[:, 1], rtol=2**-8, atol=0.0)


def test_no_heads() -> None:
    with pytest.raises(ValueError, match="num_heads=0"):
        Alibi(0)
