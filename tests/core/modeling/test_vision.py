"""Image towers: equal to the reference's on tiny random configurations, and the same whatever images are beside."""

import pytest
import torch
import transformers
from pydantic import BaseModel
from torch import Tensor, nn

from modelport.loading.loader import load_weights
from modelport.modeling import (
    MLP,
    ClipVision,
    ClipVisionConfig,
    EncoderAttention,
    PatchEmbedding,
    SiglipVision,
    SiglipVisionConfig,
    feature_layers,
    segments,
)
from modelport.plugin import Architecture


def randomise(reference: nn.Module, seed: int = 0) -> nn.Module:
    """Values that make every parameter matter: biases, tokens and gates are zero in a fresh model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in reference.named_parameters():
        is_factor = parameter.dim() == 1 and name.endswith("weight")  # of a norm
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if is_factor else 0.15 * noise
    return reference.eval()


def load(
    tower: type[nn.Module],
    cfg: BaseModel,
    weights: dict[str, Tensor],
    *args: object,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> nn.Module:
    """`tower(cfg, *args, **options)` with `weights`, which it must know to the last one."""
    with torch.device("meta"):
        model = tower(cfg, *args, **options)
    architecture = Architecture("Tower", tower, type(cfg))
    load_weights(model, weights.items(), architecture, cfg, dtype, torch.device("cpu"))
    return model.eval()


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


VIT = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 23,
       "patch_size": 5}  # fmt: skip


def vit(kind: str) -> tuple[type[nn.Module], BaseModel, nn.Module]:
    if kind == "clip":
        reference = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT))
        return ClipVision, ClipVisionConfig(**VIT), randomise(reference)
    reference = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VIT))
    return SiglipVision, SiglipVisionConfig(**VIT), randomise(reference)


def weights_of(reference: nn.Module) -> dict[str, Tensor]:
    """By today's names, and with what old checkpoints store beside."""
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in reference.state_dict().items()}
    return weights | {"embeddings.position_ids": torch.arange(3)}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vit_states_are_those_of_the_reference(kind: str) -> None:
    tower, cfg, reference = vit(kind)
    pixels = torch.randn(3, 3, 23, 23)
    with torch.inference_mode():
        wanted = reference(pixels, output_hidden_states=True)
        states = wanted.hidden_states
        assert len(states) == 5
        close(load(tower, cfg, weights_of(reference))(pixels), wanted.last_hidden_state)
        for layer in (-1, -2, 0, 3, -5):
            model = load(tower, cfg, weights_of(reference), layer)
            assert len(model.encoder.layers) == layer % 5
            close(model(pixels), states[layer])
        close(load(tower, cfg, weights_of(reference), [-2, 1])(pixels), torch.cat([states[-2], states[1]], -1))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vit_rows_do_not_depend_on_other_images_and_bfloat16_runs(kind: str) -> None:
    tower, cfg, reference = vit(kind)
    pixels = torch.randn(4, 3, 23, 23)
    model = load(tower, cfg, weights_of(reference), -2)
    half = load(tower, cfg, weights_of(reference), -2, dtype=torch.bfloat16)
    with torch.inference_mode():
        together = model(pixels)
        close(model(pixels[2:3]), together[2:3])
        rounded = half(pixels)
    assert rounded.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(rounded.float(), together, dim=-1).min() > 0.99


def test_wrong_image_sizes_and_layers_are_refused() -> None:
    tower, cfg, reference = vit("clip")
    with pytest.raises(ValueError, match=r"\(1, 3, 20, 23\): this tower takes images of 23 x 23"):
        load(tower, cfg, weights_of(reference))(torch.zeros(1, 3, 20, 23))
    with pytest.raises(ValueError, match="vision_feature_layer=-6: 4 layers have the states 0 to 4"):
        feature_layers(-6, 4)
    with pytest.raises(ValueError, match=r"hidden_size=30 .*num_attention_heads=4"):
        ClipVisionConfig(hidden_size=30, num_attention_heads=4)
    assert ClipVisionConfig(hidden_size=None).hidden_size == 768


@pytest.mark.parametrize("bias", [False, True])
def test_patches_are_a_convolution(bias: bool) -> None:
    patch = PatchEmbedding(3, 7, (4, 5), bias)
    conv = nn.Conv2d(3, 7, (4, 5), (4, 5), bias=bias)
    patch.weight.data = conv.weight.data
    if bias:
        patch.bias.data = conv.bias.data
    patch.pack()
    pixels = torch.randn(2, 3, 14, 16)
    close(patch(pixels), conv(pixels).flatten(2).transpose(1, 2).flatten(0, 1))
    close(patch(patch.cut(pixels)), patch(pixels))


@pytest.mark.parametrize("lengths", [[3, 3, 3], [2, 2, 5, 2], [4, 0, 1]])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_stays_within_segments(lengths: list[int], kv_heads: int) -> None:
    q, k, v = torch.randn(sum(lengths), 4, 8), *torch.randn(2, sum(lengths), kv_heads, 8).unbind(0)
    found = EncoderAttention(8)(q, k, v, segments(lengths, q.device))
    k, v = (part.repeat_interleave(4 // kv_heads, dim=1) for part in (k, v))
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores = torch.einsum("qhd,khd->hqk", q, k) * 8**-0.5
    scores = scores.masked_fill(segment[:, None] != segment, float("-inf"))
    close(found, torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))


def test_a_projector_has_a_width_of_its_own() -> None:
    first, second = nn.Linear(6, 9), nn.Linear(9, 4)
    weights = {f"linear_1.{n}": p for n, p in first.state_dict().items()}
    weights |= {f"linear_2.{n}": p for n, p in second.state_dict().items()}
    with torch.device("meta"):
        mlp = MLP(6, 9, "gelu", bias=True, names=("linear_1", "linear_2"), out_size=4)
    load_weights(mlp, weights.items(), Architecture("P", MLP, BaseModel), None, torch.float32, torch.device("cpu"))
    x = torch.randn(3, 6)
    with torch.inference_mode():
        close(mlp(x), second(nn.functional.gelu(first(x))))
