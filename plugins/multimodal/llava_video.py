"""LLaVA's models that also take films: LLaVA-NeXT-Video and LLaVA-OneVision (Zhang et al., Li et al., 2024).

Decisions: every image is taken in tiles, as the published processors do with a plain list of images. Of a film with
more frames than the processor's `num_frames`, or than `MOST_FRAMES` where it does not say, so many are looked at, at
even distances; frames are resized with Pillow, as the processors that the models were published with did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from modelport.config import TextConfig
from modelport.inputs.images import ImageSettings, preprocess
from modelport.inputs.processor import MediaItem, ProcessorFiles
from modelport.inputs.tokenizer import Tokenizer
from modelport.plugin import Architecture, hookimpl
from modelport.plugins.multimodal.llava import PREPROCESSOR, RENAME, TINY_TEXT, TINY_TOWER
from modelport.plugins.multimodal.llava_next import (
    LlavaNext,
    LlavaNextConfig,
    LlavaNextInputs,
    Size,
    num_patches,
)

if TYPE_CHECKING:
    from modelport.inputs.media import Video

modelport_api = 1
MOST_FRAMES = 32
GRIDS = tuple((384 * high, 384 * wide) for high in range(1, 7) for wide in range(1, 7))


class FilmConfig(LlavaNextConfig):
    video_token_index: int = 32000
    image_token_index: int = 32001

    @model_validator(mode="before")
    @classmethod
    def _todays_video_token(cls, data: Any) -> Any:
        return {"video_token_index": data["video_token_id"], **data} if "video_token_id" in data else data

    @property
    def side(self) -> int:
        """Patches along an edge of the tower."""
        return self.vision_config.image_size // self.vision_config.patch_size


class LlavaNextVideoConfig(FilmConfig):
    spatial_pool_mode: Literal["average", "max"] = "average"
    spatial_pool_stride: int = 2


class LlavaOnevisionConfig(FilmConfig):
    image_token_index: int = 151646
    video_token_index: int = 151647
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    vision_feature_layer: int | tuple[int, ...] = -1
    image_grid_pinpoints: tuple[Size, ...] = GRIDS
    vision_aspect_ratio: str = Field("anyres_max_9", pattern=r"anyres_max_\d+")

    @property
    def most_tiles(self) -> int:
        return int(self.vision_aspect_ratio.removeprefix("anyres_max_"))


class FilmInputs(LlavaNextInputs):
    """Images in tiles and films."""

    modalities = {"image": None, "video": None}

    def __init__(self, config: FilmConfig, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        super().__init__(config, text, files, tokenizer)
        found = files.settings("video_processor")
        self.num_frames = found.get("num_frames") or MOST_FRAMES
        if not isinstance(self.num_frames, int) or self.num_frames < 1:
            raise ValueError(f"num_frames of the video processor is {self.num_frames!r}; give a whole number from 1")
        self.frames = ImageSettings.model_validate({**self.sizes, **found, "do_pad": False})

    def placeholder(self, modality: str) -> str:
        return f"<{modality}>"

    def placeholder_id(self, modality: str) -> int:
        return self.config.image_token_index if modality == "image" else self.config.video_token_index

    def pick_frames(self, total: int, fps: float | None) -> Sequence[int]:
        if total <= self.num_frames:
            return range(total)
        return [place * total // self.num_frames for place in range(self.num_frames)]

    def video(self, video: Video) -> MediaItem:
        pixels = torch.from_numpy(np.stack([preprocess(frame, self.frames) for frame in video.frames]))
        rows = self.film_rows(len(pixels))
        return MediaItem("video", [self.config.video_token_index] * rows, {"pixel_values_videos": pixels})

    def film_rows(self, frames: int) -> int:
        """Of a film in the model."""
        return frames * (self.config.side // self.config.spatial_pool_stride) ** 2


class OnevisionInputs(FilmInputs):
    square = True

    def num_rows(self, size: Size, best: Size) -> int:
        cfg = self.config
        rows, columns = num_patches(size, best, cfg.vision_config.image_size, cfg.side)
        rows, columns = limited(rows, columns, cfg.most_tiles * cfg.side**2)
        return rows * (columns + 1)

    def film_rows(self, frames: int) -> int:
        return frames * ceil(self.config.side / 2) ** 2 + 1


def limited(rows: int, columns: int, most: int) -> Size:
    """What a grid of patches is shrunk to when it has clearly more than `most`."""
    ratio = sqrt(rows * columns / most)
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


class Film(LlavaNext):
    """What the two have in common: a film's frames go through the tower one by one."""

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        if modality == "image":
            return super().embed_media(modality, items)
        films = [item["pixel_values_videos"] for item in items]
        return [self.film(rows) for rows in self.frames(torch.cat(films)).split([len(film) for film in films])]

    def frames(self, pixels: Tensor) -> Tensor:
        """pixels: (frames, channels, height, width) -> (frames, rows, hidden_size)."""
        raise NotImplementedError

    def film(self, rows: Tensor) -> Tensor:
        """rows: (frames, rows, hidden_size) of one film -> (rows, hidden_size)."""
        return rows.flatten(0, 1)

    def pooled(self, states: Tensor, pool: Any) -> Tensor:
        """states: (frames, patches ** 2, size) -> (frames, fewer, size), pooled over rows and columns."""
        grid = states.unflatten(1, (self.patches, self.patches)).permute(0, 3, 1, 2)
        return pool(grid).flatten(2).transpose(1, 2).contiguous()


class LlavaNextVideo(Film):
    """States of a frame are pooled before the projector."""

    def __init__(self, cfg: LlavaNextVideoConfig, language: nn.Module):
        super().__init__(cfg, language)
        kind = nn.AvgPool2d if cfg.spatial_pool_mode == "average" else nn.MaxPool2d
        self.pool = kind(cfg.spatial_pool_stride, cfg.spatial_pool_stride)

    def frames(self, pixels: Tensor) -> Tensor:
        states = self.pooled(self.vision_tower(pixels)[:, self.first :], self.pool)
        return self.multi_modal_projector(states.flatten(0, 1)).unflatten(0, states.shape[:2])


class LlavaOnevision(Film):
    """Rows of a frame are halved in both directions after the projector, and a film ends in a newline."""

    def __init__(self, cfg: LlavaOnevisionConfig, language: nn.Module):
        super().__init__(cfg, language)
        self.most = cfg.most_tiles * self.patches**2

    def shrunk(self, grid: Tensor) -> Tensor:
        size = limited(*grid.shape[:2], self.most)
        if size == tuple(grid.shape[:2]):
            return grid
        return nn.functional.interpolate(grid.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)

    def frames(self, pixels: Tensor) -> Tensor:
        half = (ceil(self.patches / 2), ceil(self.patches / 2))
        return self.pooled(self.features(pixels), lambda grid: nn.functional.interpolate(grid, half, mode="bilinear"))

    def film(self, rows: Tensor) -> Tensor:
        return torch.cat([rows.flatten(0, 1), self.image_newline.to(rows.dtype)[None]])


def make(
    name: str, model: type[Film], config: type[FilmConfig], inputs: type[FilmInputs], tiny: dict, variants: dict
) -> Architecture:
    edge = tiny["vision_config"]["image_size"]
    square = {"size": {"height": edge, "width": edge}, "do_center_crop": False}
    crop = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    sizes = {key: value for key, value in PREPROCESSOR.items() if key not in ("image_processor_type", "crop_size")}
    sizes |= square if inputs.square else crop
    pinpoints = tiny["image_grid_pinpoints"]
    return Architecture(
        name,
        model,
        config,
        rename={**RENAME, "model.image_newline": "image_newline"},
        ignore=("*.rotary_emb.inv_freq",),
        inputs=inputs,
        language="text_config",
        reference=f"transformers:{name}",
        tiny=tiny,
        files={
            "preprocessor_config.json": {**sizes, "image_grid_pinpoints": pinpoints, "do_pad": True},
            "video_preprocessor_config.json": sizes,
        },
        variants=variants,
    )


@hookimpl
def register_architectures() -> list[Architecture]:
    edge = 18
    pinpoints = [[edge * high, edge * wide] for high in (1, 2) for wide in (1, 2)]
    tower = {**TINY_TOWER, "image_size": edge}
    tiny = {
        "text_config": TINY_TEXT,
        "vision_config": tower,
        "image_token_index": 319,
        "video_token_index": 318,
        "image_grid_pinpoints": pinpoints,
    }
    qwen = {**TINY_TEXT, "model_type": "qwen2", "use_sliding_window": False}
    siglip = {**tower, "model_type": "siglip_vision_model"}
    onevision = {**tiny, "text_config": qwen, "vision_config": siglip}
    return [
        make(
            "LlavaNextVideoForConditionalGeneration",
            LlavaNextVideo,
            LlavaNextVideoConfig,
            FilmInputs,
            tiny,
            {
                "largest": {"spatial_pool_mode": "max", "spatial_pool_stride": 3},
                "mistral": {"text_config": {**TINY_TEXT, "model_type": "mistral", "sliding_window": None}},
            },
        ),
        make(
            "LlavaOnevisionForConditionalGeneration",
            LlavaOnevision,
            LlavaOnevisionConfig,
            OnevisionInputs,
            onevision,
            {"few_tiles": {"vision_aspect_ratio": "anyres_max_1"}},
        ),
    ]
