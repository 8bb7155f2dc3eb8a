"""Pixtral as its authors publish it: `params.json` and `consolidated.safetensors` (Agrawal et al., 2024).

Decisions: `params.json` is read as the configuration that transformers would write, so that the model is LLaVA's with
Pixtral's tower (transformers' own layout has that name); the authors pair neighbours in rotary embeddings where we pair
halves, so query and key weights are reordered as they are read; pictures are resized as the authors do it, which is
not Pillow's way. Mistral Small 3.1 adds a norm and merges patches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from modelport.inputs.images import ImageSettings, normalize, to_rgb
from modelport.inputs.processor import InputProcessor, MediaItem
from modelport.modeling import Linear, RMSNorm
from modelport.plugin import Architecture, Checkpoint, hookimpl
from modelport.plugins.multimodal.llava import Llava, LlavaConfig, line_item
from modelport.plugins.multimodal.pixtral_tower import PixtralVisionConfig

if TYPE_CHECKING:
    from PIL.Image import Image

modelport_api = 1
MEAN, STD = (ImageSettings.model_fields[name].default for name in ("image_mean", "image_std"))


class PixtralConfig(LlavaConfig):
    """What `read_config` makes of `params.json`.

    :ivar head_dim: of the language model.
    :ivar longest_edge: pixels to which larger images are shrunk.
    """

    vision_config: PixtralVisionConfig
    head_dim: int
    longest_edge: int
    spatial_merge_size: int = 1
    merges_patches: bool = False
    norms_patches: bool = False
    image_break_token_id: int = 12
    image_end_token_id: int = 13


class PixtralInputs(InputProcessor):
    modalities = {"image": None}

    def placeholder(self, modality: str) -> str:
        return "[IMG]"

    def placeholder_id(self, modality: str) -> int:
        return self.config.image_token_index

    def image(self, image: Image) -> MediaItem:
        cfg = self.config
        unit = cfg.vision_config.patch_size * cfg.spatial_merge_size
        ratio = max(image.size) / cfg.longest_edge
        high, wide = (edge if ratio <= 1 else round(edge / ratio) for edge in (image.height, image.width))
        if not high or not wide:
            raise ValueError(f"a picture of {image.width} x {image.height} is too narrow to be shrunk to "
                             f"{cfg.longest_edge}")  # fmt: skip
        rows, columns = (high - 1) // unit + 1, (wide - 1) // unit + 1
        pixels = torch.from_numpy(np.asarray(to_rgb(image, background=(255, 255, 255))).copy())
        values = resized(pixels.permute(2, 0, 1), (rows * unit, columns * unit))
        ids = (cfg.image_token_index, cfg.image_break_token_id, cfg.image_end_token_id)
        return line_item(rows, columns, ids, {"pixel_values": values})


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with a = -0.75 and without averaging, as OpenCV's INTER_CUBIC; then CLIP's normalization.

    :param pixels: (3, height, width) uint8.
    :return: (3, *size) float32.
    """
    if tuple(pixels.shape[1:]) == size:
        return torch.from_numpy(normalize(pixels.permute(1, 2, 0).numpy(), 1 / 255, MEAN, STD))
    values = nn.functional.interpolate(pixels[None].float(), size, mode="bicubic", align_corners=False)[0]
    return (values / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class PatchMerger(nn.Module):
    """Squares of `merge` x `merge` patches become one row each, through a linear."""

    def __init__(self, size: int, merge: int):
        super().__init__()
        self.merge = merge
        self.merging_layer = Linear(size * merge**2, size, bias=False)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        """x: (rows * columns, size) -> (rows * columns / merge ** 2, size)."""
        merge, size = self.merge, x.shape[1]
        squares = x.view(rows // merge, merge, -1, merge, size).permute(0, 2, 4, 1, 3)
        return self.merging_layer(squares.reshape(-1, size * merge**2))


class Pixtral(Llava):
    def __init__(self, cfg: PixtralConfig, language: nn.Module):
        super().__init__(cfg, language)
        size = cfg.vision_config.hidden_size
        self.patch_size = cfg.vision_config.patch_size
        self.pre_mm_projector_norm = RMSNorm(size, 1e-5) if cfg.norms_patches else None
        self.patch_merger = PatchMerger(size, cfg.spatial_merge_size) if cfg.merges_patches else None

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        images = [item["pixel_values"] for item in items]
        states = self.vision_tower(images)
        if self.pre_mm_projector_norm is not None:
            states = [self.pre_mm_projector_norm(rows) for rows in states]
        if self.patch_merger is not None:
            high = [image.shape[1] // self.patch_size for image in images]
            states = [self.patch_merger(rows, count) for rows, count in zip(states, high, strict=True)]
        return list(self.multi_modal_projector(torch.cat(states)).split([len(rows) for rows in states]))

    @property
    def media_modules(self) -> list[nn.Module]:
        return [module for module in super().media_modules if module is not None]


RENAME = {
    "vision_encoder.": "vision_tower.",
    "vision_language_adapter.w_in.": "multi_modal_projector.linear_1.",
    "vision_language_adapter.w_out.": "multi_modal_projector.linear_2.",
    "tok_embeddings.": "language_model.model.embed_tokens.",
    "layers.": "language_model.model.layers.",
    "norm.": "language_model.model.norm.",
    "output.": "language_model.lm_head.",
}
TEXT_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
TOWER_LAYER = {
    name: ours.replace("self_attn", "attention").replace("mlp", "feed_forward") if "." in name else name
    for name, ours in TEXT_LAYER.items()
}
_LAYER = re.compile(r"(.*layers\.\d+)\.(.+)\.weight")


def weights(stream: Iterator[tuple[str, Tensor]], cfg: PixtralConfig) -> Iterator[tuple[str, Tensor]]:
    """Names within layers, and pairs of rotary dimensions as halves of a head."""
    tower_head = cfg.vision_config.hidden_size // cfg.vision_config.num_attention_heads
    for name, tensor in stream:
        found = _LAYER.fullmatch(name)
        if found is None:
            yield name, tensor
            continue
        in_tower = name.startswith("vision_tower.")
        if found[2] in ("attention.wq", "attention.wk"):
            pairs = (tower_head if in_tower else cfg.head_dim) // 2
            tensor = tensor.unflatten(0, (-1, pairs, 2)).transpose(1, 2).flatten(0, 2)
        yield f"{found[1]}.{(TOWER_LAYER if in_tower else TEXT_LAYER).get(found[2], found[2])}.weight", tensor


@hookimpl
def read_config(checkpoint: Checkpoint) -> dict | None:
    file = checkpoint.path / "params.json"
    if not file.is_file() or (checkpoint.path / "config.json").is_file():
        return None
    try:
        params = json.loads(file.read_text("utf-8"))
        tower = params.get("vision_encoder")
        return None if tower is None else _config(params, tower)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error!r}); download it again") from None


def _config(params: dict, tower: dict) -> dict:
    text = {
        "model_type": "mistral",
        "vocab_size": params["vocab_size"],
        "hidden_size": params["dim"],
        "intermediate_size": params["hidden_dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads", params["n_heads"]),
        "head_dim": params["head_dim"],
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "sliding_window": params.get("sliding_window"),
        "max_position_embeddings": params.get("max_position_embeddings") or params.get("max_seq_len", 128000),
        "tie_word_embeddings": params.get("tied_embeddings", False),
    }
    copied = ("hidden_size", "image_size", "patch_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "rope_theta")  # fmt: skip
    vision = {key: tower[key] for key in copied}
    return {
        "architectures": ["PixtralForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"model_type": "pixtral", "hidden_act": "silu", **vision},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": tower.get("adapter_bias", True),
        "head_dim": params["head_dim"],
        "longest_edge": tower.get("max_image_size") or tower["image_size"],
        "spatial_merge_size": tower.get("spatial_merge_size", 1),
        "merges_patches": tower.get("mm_projector_id") == "patch_merge",
        "norms_patches": tower.get("add_pre_mm_projector_layer_norm", False),
        "image_token_index": tower["image_token_id"],
        "image_break_token_id": tower.get("image_break_token_id", 12),
        "image_end_token_id": tower.get("image_end_token_id", 13),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


@hookimpl
def register_architectures() -> list[Architecture]:
    return [
        Architecture(
            "PixtralForConditionalGeneration",
            Pixtral,
            PixtralConfig,
            rename=RENAME,
            weights=weights,
            inputs=PixtralInputs,
            language="text_config",
        )
    ]
