"""Norm layers against the families' own, through the kernel and through its reference."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.stablelm.modeling_stablelm import StableLmLayerNormPerHead

from modelport.kernels import cpu
from modelport.modeling import LayerNorm, QKVLinear, RMSNorm

TOKENS, HEADS, SIZE = 5, 3, 24


@pytest.fixture(params=["native", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "reference":
        monkeypatch.setattr(cpu, "lib", None)


def filled(norm: nn.Module, *values: Tensor) -> nn.Module:
    """The norm as the core leaves it: parameters loaded, tables built."""
    for parameter, value in zip(norm.parameters(), values, strict=True):
        parameter.data.copy_(value)
    norm.build_tables(torch.device("cpu"), 8)
    return norm


def heads_of_a_projection(dtype: torch.dtype = torch.float32) -> Tensor:
    """(tokens, heads, size), a strided view."""
    fused = torch.randn(TOKENS, 2 * HEADS * SIZE, dtype=dtype).view(TOKENS, 2 * HEADS, SIZE)
    return fused[:, HEADS:]


def close(got: Tensor, want: Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}[want.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_weights(dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS, SIZE, dtype=dtype) + 2
    norm = filled(LayerNorm(SIZE, 1e-5, bias=False, weight=False))
    assert not list(norm.parameters())
    close(norm(x), OlmoLayerNorm(SIZE)(x))
    close(filled(RMSNorm(SIZE, 1e-5, weight=False))(x), nn.functional.rms_norm(x.float(), (SIZE,), eps=1e-5).to(dtype))


def test_bias_alone() -> None:
    x, bias = torch.randn(TOKENS, SIZE), torch.randn(SIZE)
    close(filled(LayerNorm(SIZE, weight=False), bias)(x), nn.functional.layer_norm(x, (SIZE,), bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_around_zero(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(TOKENS, SIZE, dtype=dtype), torch.randn(SIZE, dtype=dtype), torch.randn(SIZE)
    theirs = NemotronLayerNorm1P(SIZE, dtype=dtype)
    theirs.weight.data, theirs.bias.data = weight, bias.to(dtype)
    mine = LayerNorm(SIZE, offset=1.0).to(dtype)
    close(filled(mine, weight, bias)(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_per_head(dtype: torch.dtype) -> None:
    x, weight = heads_of_a_projection(dtype), torch.randn(HEADS, SIZE).to(dtype)
    cohere = CohereLayerNorm((HEADS, SIZE), eps=1e-5)
    cohere.weight.data = weight
    mine = filled(LayerNorm((HEADS, SIZE), 1e-5, bias=False).to(dtype), weight)
    close(mine(x), cohere(x))
    close(mine(x[:1]), cohere(x[:1]))
    stable = StableLmLayerNormPerHead(SIZE, HEADS, eps=1e-5).to(dtype)
    for norm, row in zip(stable.norms, weight, strict=True):
        norm.weight.data = row
    close(mine(x), stable(x.transpose(0, 1)[None])[0].transpose(0, 1))
    rms = filled(RMSNorm((HEADS, SIZE), 1e-5).to(dtype), weight)
    close(rms(x), (nn.functional.rms_norm(x.float(), (SIZE,), eps=1e-5).to(dtype) * weight))


def test_a_bias_per_head() -> None:
    x, weight, bias = heads_of_a_projection(), torch.randn(HEADS, SIZE), torch.randn(HEADS, SIZE)
    mine = filled(LayerNorm((HEADS, SIZE), 1e-5), weight, bias)
    close(mine(x), nn.functional.layer_norm(x, (SIZE,), eps=1e-5) * weight + bias)


def test_one_weight_for_all_heads() -> None:
    """Qwen3 and Persimmon: q and k straight from the fused projection, no copy."""
    x, weight, bias = heads_of_a_projection(), torch.randn(SIZE), torch.randn(SIZE)
    theirs = Qwen3RMSNorm(SIZE, 1e-6)
    theirs.weight.data = weight
    close(filled(RMSNorm(SIZE, 1e-6), weight)(x), theirs(x))
    close(filled(LayerNorm(SIZE), weight, bias)(x), nn.functional.layer_norm(x, (SIZE,), weight, bias))


def test_the_whole_projection() -> None:
    """OLMo2: one norm over all heads of q; flattening the projection's view copies nothing."""
    qkv = QKVLinear(SIZE, HEADS, 1, SIZE)
    qkv.weight.data.normal_()
    qkv.pack()
    q, _, _ = qkv(torch.randn(TOKENS, SIZE))
    flat = q.flatten(1)
    assert flat.data_ptr() == q.data_ptr()
    theirs = Olmo2RMSNorm(HEADS * SIZE, 1e-6)
    theirs.weight.data.normal_()
    close(filled(RMSNorm(HEADS * SIZE, 1e-6), theirs.weight)(flat), theirs(flat))


def test_weights_that_do_not_fit() -> None:
    x = torch.randn(TOKENS, HEADS, SIZE)
    with pytest.raises(ValueError, match="weight"):
        filled(LayerNorm((HEADS + 1, SIZE), bias=False), torch.ones(HEADS + 1, SIZE))(x)
    with pytest.raises(ValueError, match="weight"):
        filled(RMSNorm((TOKENS, SIZE)), torch.ones(TOKENS, SIZE))(torch.randn(TOKENS, SIZE))
