"""LLaVA-NeXT: an image as a whole and in tiles, whose rows end in a learned newline (Liu et al., 2024, LLaVA 1.6).

Decisions: an image is resized into the best of a few resolutions, padded, and cut into tiles of the tower's size; what
the tower makes of the tiles is put together again and the padding cut away. Which resolution is best follows from the
image's size alone, so that the front end counts the rows that the model will make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from modelport.config import TextConfig
from modelport.inputs.images import BICUBIC, ImageSettings, preprocess, resize, to_rgb
from modelport.inputs.processor import InputProcessor, MediaItem, ProcessorFiles
from modelport.inputs.tokenizer import Tokenizer
from modelport.modeling.vit import ClipVisionConfig
from modelport.plugin import Architecture, hookimpl
from modelport.plugins.multimodal.llava import PREPROCESSOR, RENAME, TINY_TEXT, TINY_TOWER, Llava, LlavaConfig

if TYPE_CHECKING:
    from PIL.Image import Image

modelport_api = 1
Size = tuple[int, int]  # height, width
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


class LlavaNextConfig(LlavaConfig):
    image_grid_pinpoints: tuple[Size, ...] = PINPOINTS

    @model_validator(mode="after")
    def _tiles_are_whole(self) -> LlavaNextConfig:
        edge = self.vision_config.image_size
        for size in self.image_grid_pinpoints:
            if size[0] % edge or size[1] % edge:
                raise ValueError(f"image_grid_pinpoints has {list(size)}, which tiles of {edge} x {edge} do not fill")
        has_class = isinstance(self.vision_config, ClipVisionConfig)
        if has_class != (self.vision_feature_select_strategy == "default"):
            raise ValueError(
                f"vision_feature_select_strategy={self.vision_feature_select_strategy!r} with a "
                f"{self.vision_config.model_type} leaves other rows than those of the patches, which cannot be put "
                f"together; {'default' if has_class else 'full'!r} can"
            )
        return self


class LlavaNextInputs(InputProcessor):
    """Images in tiles.

    :cvar square: pictures are resized to a square without keeping their proportions, unless the files say otherwise.
    """

    modalities = {"image": None}
    embeddable = ("image",)
    square: ClassVar[bool] = False

    def __init__(self, config: LlavaNextConfig, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        super().__init__(config, text, files, tokenizer)
        edge = config.vision_config.image_size
        cropped = {"size": {"shortest_edge": edge}, "crop_size": edge, "do_center_crop": True}
        self.sizes = {"size": {"height": edge, "width": edge}} if self.square else cropped
        found = files.settings()
        pinpoints = found.get("image_grid_pinpoints")
        if pinpoints is not None and {tuple(size) for size in pinpoints} != set(config.image_grid_pinpoints):
            raise ValueError(
                f"image_grid_pinpoints of the image processor are {pinpoints}, those of config.json "
                f"{[list(size) for size in config.image_grid_pinpoints]}; they must be the same"
            )
        # do_pad here means that images get equally many tiles, which they need not
        self.images = ImageSettings.model_validate({**self.sizes, **found, "do_pad": False})

    def placeholder(self, modality: str) -> str:
        return "<image>"

    def placeholder_id(self, modality: str) -> int:
        return self.config.image_token_index

    def image(self, image: Image) -> MediaItem:
        image = to_rgb(image, background=(255, 255, 255))
        vision, size = self.config.vision_config, (image.height, image.width)
        best = best_resolution(size, self.config.image_grid_pinpoints)
        resample = BICUBIC if self.images.resample is None else self.images.resample
        tiles = [resize(image, (vision.image_size, vision.image_size), resample)]
        tiles += cut(fitted(image, best, resample), vision.image_size)
        pixels = torch.from_numpy(np.stack([preprocess(tile, self.images) for tile in tiles]))
        rows = vision.patches + self.num_rows(size, best)
        tensors = {"pixel_values": pixels, "image_sizes": torch.tensor(size)}
        return MediaItem("image", [self.config.image_token_index] * rows, tensors)

    def num_rows(self, size: Size, best: Size) -> int:
        """Of an image's tiles put together, a newline after each."""
        vision = self.config.vision_config
        rows, columns = num_patches(size, best, vision.image_size, vision.image_size // vision.patch_size)
        return rows * (columns + 1)


def best_resolution(size: Size, choices: Sequence[Size]) -> Size:
    """The choice that keeps most of an image's pixels, and of several the one that wastes least."""

    def merit(choice: Size) -> tuple[int, int]:
        scale = min(choice[1] / size[1], choice[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - choice[0] * choice[1]

    return max(choices, key=merit)


def fitted(image: Image, target: Size, resample: int) -> Image:
    """The image resized to fill `target` in one direction, in its middle, black around."""
    scale_high, scale_wide = target[0] / image.height, target[1] / image.width
    if scale_wide < scale_high:
        high, wide = min(ceil(image.height * scale_wide), target[0]), target[1]
    else:
        high, wide = target[0], min(ceil(image.width * scale_high), target[1])
    top, left = (target[0] - high) // 2, (target[1] - wide) // 2
    return resize(image, (high, wide), resample).crop((-left, -top, target[1] - left, target[0] - top))


def cut(image: Image, edge: int) -> list[Image]:
    """Square tiles, row by row."""
    return [
        image.crop((left, top, left + edge, top + edge))
        for top in range(0, image.height, edge)
        for left in range(0, image.width, edge)
    ]


def inner(size: Size, grid: Size) -> tuple[slice, slice]:
    """Rows and columns of a padded grid of patches that an image of `size` reaches."""
    rows, columns = grid
    if size[1] / size[0] > columns / rows:
        gap = (rows - int(round(size[0] * (columns / size[1]), 7))) // 2
        return slice(gap, rows - gap), slice(0, columns)
    gap = (columns - int(round(size[1] * (rows / size[0]), 7))) // 2
    return slice(0, rows), slice(gap, columns - gap)


def num_patches(size: Size, best: Size, edge: int, patches: int) -> Size:
    """Rows and columns of an image's tiles put together, without the padding.

    :param patches: along the `edge` of a tile.
    """
    rows, columns = inner(size, (best[0] // edge * patches, best[1] // edge * patches))
    return rows.stop - rows.start, columns.stop - columns.start


class LlavaNext(Llava):
    """LLaVA over tiles."""

    def __init__(self, cfg: LlavaNextConfig, language: nn.Module):
        super().__init__(cfg, language)
        self.image_newline = nn.Parameter(torch.empty(self.hidden_size), requires_grad=False)
        self.choices, self.edge = cfg.image_grid_pinpoints, cfg.vision_config.image_size
        self.patches = self.edge // cfg.vision_config.patch_size

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        features = self.features(torch.cat([item["pixel_values"] for item in items]))
        several = features.split([len(item["pixel_values"]) for item in items])
        sizes = [tuple(item["image_sizes"].tolist()) for item in items]
        return [self.joined(tiles, size) for tiles, size in zip(several, sizes, strict=True)]

    def joined(self, tiles: Tensor, size: Size) -> Tensor:
        """tiles: (1 + tiles, patches ** 2, hidden), the first the whole image -> (rows, hidden)."""
        best = best_resolution(size, self.choices)
        high, wide = best[0] // self.edge, best[1] // self.edge
        grid = tiles[1:].view(high, wide, self.patches, self.patches, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        grid = self.shrunk(grid[inner(size, grid.shape[:2])])  # (rows, columns, hidden)
        lines = torch.cat([grid, self.image_newline.to(grid.dtype).expand(len(grid), 1, -1)], dim=1)
        return torch.cat([tiles[0], lines.flatten(0, 1)])

    def shrunk(self, grid: Tensor) -> Tensor:
        """For models that take a limited number of rows."""
        return grid


@hookimpl
def register_architectures() -> list[Architecture]:
    edge = 18
    tower = {**TINY_TOWER, "image_size": edge}
    pinpoints = [[edge, 2 * edge], [2 * edge, edge], [2 * edge, 2 * edge], [3 * edge, edge], [edge, 3 * edge]]
    tiny = {
        "text_config": TINY_TEXT,
        "vision_config": tower,
        "image_token_index": 319,
        "image_grid_pinpoints": pinpoints,
    }
    preprocessor = {
        **PREPROCESSOR,
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": edge},
        "crop_size": {"height": edge, "width": edge},
        "image_grid_pinpoints": pinpoints,
        "do_pad": True,
    }
    siglip = {**tower, "model_type": "siglip_vision_model"}
    return [
        Architecture(
            "LlavaNextForConditionalGeneration",
            LlavaNext,
            LlavaNextConfig,
            rename={**RENAME, "model.image_newline": "image_newline"},
            ignore=("*.rotary_emb.inv_freq",),
            inputs=LlavaNextInputs,
            language="text_config",
            reference="transformers:LlavaNextForConditionalGeneration",
            tiny=tiny,
            files={"preprocessor_config.json": preprocessor},
            variants={
                "siglip": {"vision_config": siglip, "vision_feature_select_strategy": "full"},
                "several_layers": {"vision_feature_layer": [-3, -1]},
                "mistral": {"text_config": {**TINY_TEXT, "model_type": "mistral", "sliding_window": None}},
            },
        )
    ]
