"""Towers for images of any size: equal to the reference's, and the same whatever images are beside."""

import pytest
import torch
import transformers
from pydantic import BaseModel
from torch import Tensor, nn

from modelport.loading.loader import load_weights
from modelport.plugin import Architecture
from modelport.plugins.multimodal.pixtral_tower import PixtralVision, PixtralVisionConfig
from modelport.plugins.multimodal.qwen_tower import (
    Qwen2_5VisionConfig,
    Qwen2_5VisionTower,
    Qwen2VisionConfig,
    Qwen2VisionTower,
)
from modelport.testing.reference import fill


def filled(reference: nn.Module) -> nn.Module:
    fill(reference, 0)
    return reference.eval()


def load(
    tower: type[nn.Module], cfg: BaseModel, weights: dict[str, Tensor], *args: object,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:  # fmt: skip
    """`tower(cfg, *args)` with `weights`, which it must know to the last one."""
    with torch.device("meta"):
        model = tower(cfg, *args)
    load_weights(model, weights.items(), Architecture("Tower", tower, type(cfg)), cfg, dtype, torch.device("cpu"))
    return model.eval()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


PIXTRAL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
           "image_size": 64, "patch_size": 4}  # fmt: skip


@pytest.mark.parametrize("theta", [10000.0, 100.0])
def test_pixtral_images_of_any_sizes(theta: float) -> None:
    config = transformers.PixtralVisionConfig(
        **PIXTRAL, rope_parameters={"rope_type": "axial", "rope_theta": theta}, attn_implementation="eager"
    )
    reference = filled(transformers.PixtralVisionModel(config))
    images = [torch.randn(3, 12, 20), torch.randn(3, 20, 12), torch.randn(3, 20, 12), torch.randn(3, 4, 4)]
    cfg = PixtralVisionConfig(**PIXTRAL, rope_parameters={"rope_theta": theta})
    assert PixtralVisionConfig(**PIXTRAL, rope_theta=theta).theta == cfg.theta
    with torch.inference_mode():
        for layer in (None, -1, -2, [0, 2]):
            model = load(PixtralVision, cfg, reference.state_dict(), layer)
            together = model(images)
            for image, rows in zip(images, together, strict=True):
                wanted = reference(image[None], output_hidden_states=True).hidden_states
                layers = [-1] if layer is None else [layer] if isinstance(layer, int) else layer
                close(rows, torch.cat([wanted[i][0] for i in layers], dim=-1))
                close(model([image])[0], rows)
        half = load(PixtralVision, cfg, reference.state_dict(), dtype=torch.bfloat16)(images)
    assert half[0].dtype == torch.bfloat16


QWEN2 = {"depth": 3, "embed_dim": 32, "hidden_size": 24, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4}
QWEN2_5 = {"depth": 4, "hidden_size": 32, "out_hidden_size": 24, "intermediate_size": 40, "num_heads": 2,
           "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1, 3]}  # fmt: skip
GRIDS = [(1, 6, 4), (3, 4, 10), (1, 2, 2), (1, 8, 8)]


def qwen(kind: str) -> tuple[type[nn.Module], BaseModel, nn.Module]:
    if kind == "qwen2":
        from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl

        config = configuration_qwen2_vl.Qwen2VLVisionConfig(**QWEN2)
        reference = modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config)
        return Qwen2VisionTower, Qwen2VisionConfig(**QWEN2), filled(reference)
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl

    config = configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(**QWEN2_5)
    reference = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(config)
    return Qwen2_5VisionTower, Qwen2_5VisionConfig(**QWEN2_5), filled(reference)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5"])
def test_qwen_images_and_videos(kind: str) -> None:
    tower, cfg, reference = qwen(kind)
    model = load(tower, cfg, reference.state_dict())
    lengths = [t * h * w for t, h, w in GRIDS]
    patches = torch.randn(sum(lengths), 3 * 2 * 4 * 4)
    with torch.inference_mode():
        together = model(patches, GRIDS)
        close(torch.cat(together), reference(patches, grid_thw=torch.tensor(GRIDS)).pooler_output)
        for part, grid, rows in zip(patches.split(lengths), GRIDS, together, strict=True):
            close(model(part, [grid])[0], rows)
        half = load(tower, cfg, reference.state_dict(), dtype=torch.bfloat16)(patches, GRIDS)
    assert torch.nn.functional.cosine_similarity(torch.cat(half).float(), torch.cat(together)).min() > 0.98


def test_grids_that_do_not_fit_are_refused() -> None:
    tower, cfg, reference = qwen("qwen2")
    model = load(tower, cfg, reference.state_dict())
    with pytest.raises(ValueError, match=r"grid \(1, 3, 4\): .*spatial_merge_size=2"):
        model(torch.zeros(12, 96), [(1, 3, 4)])
    with pytest.raises(ValueError, match="have 16 patches together, but 12 are given"):
        model(torch.zeros(12, 96), [(1, 4, 4)])
