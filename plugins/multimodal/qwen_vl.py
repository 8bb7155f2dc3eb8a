"""Qwen2-VL and Qwen2.5-VL: images and films of any size, cut into patches by the processor, and rotary positions with
three axes (arXiv 2409.12191, 2502.13923).

Decisions: what follows an item begins one behind its largest position, as the authors have it; transformers from 5.20
on counts rows and columns only, which differs for films with more pairs of frames than either. Films whose source says
how fast it is are looked at `fps` times a second (2, as the authors' tools do), others frame by frame. Frames are
resized with Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from modelport.config import MultimodalConfig, TextConfig
from modelport.inputs.images import BICUBIC, ImageSettings, from_array, normalize, resize, to_rgb
from modelport.inputs.processor import Expanded, InputProcessor, MediaItem, ProcessorFiles
from modelport.inputs.tokenizer import Tokenizer
from modelport.modeling import MediaLM
from modelport.plugin import Architecture, hookimpl
from modelport.plugins.multimodal.qwen_tower import (
    Qwen2_5VisionConfig,
    Qwen2_5VisionTower,
    Qwen2VisionConfig,
    Qwen2VisionTower,
)

if TYPE_CHECKING:
    from modelport.inputs.media import Video

modelport_api = 1
IMAGE_PIXELS = 56 * 56, 28 * 28 * 1280
FRAME_PIXELS = 128 * 28 * 28, 768 * 28 * 28
"""Fewest and most of a picture, and of a frame, where the files do not say."""
UNKNOWN_FPS = 24.0
"""Frames a second of a film that does not say, as transformers takes it."""
STRETCH = 200  # most times longer than wide


class Qwen2VLConfig(MultimodalConfig):
    vision_config: Qwen2VisionConfig = Qwen2VisionConfig()
    image_token_id: int = 151655
    video_token_id: int = 151656


class TimedVisionConfig(Qwen2_5VisionConfig):
    tokens_per_second: float = 4  # steps on the time axis


class Qwen2_5VLConfig(Qwen2VLConfig):
    vision_config: TimedVisionConfig = TimedVisionConfig()


def language_entries(entries: dict[str, Any]) -> dict[str, Any]:
    """Of Qwen2, which the language model is; published files have them among those of the whole."""
    inner = entries.get("text_config") or {k: v for k, v in entries.items() if k != "vision_config"}
    tied = any(found.get("tie_word_embeddings") for found in (entries, inner))
    rope = {"mrope_section": [16, 24, 24], **(inner.get("rope_parameters") or inner.get("rope_scaling") or {})}
    known = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "max_window_layers": 80, "max_position_embeddings": 32768}
    given = {k: v for k, v in inner.items() if k not in ("architectures", "rope_scaling")}
    return {**known, **given, "model_type": "qwen2", "rope_parameters": rope, "tie_word_embeddings": tied}


def smart_size(height: int, width: int, factor: int, fewest: int, most: int) -> tuple[int, int]:
    """The nearest (height, width) in multiples of `factor` whose pixels lie between `fewest` and `most`.

    :raises ValueError: a picture 200 times longer than wide.
    """
    if max(height, width) > STRETCH * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one edge is over {STRETCH} times the other; cut or pad it")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > most:
        shrink = sqrt(height * width / most) * factor
        rows, columns = max(1, floor(height / shrink)), max(1, floor(width / shrink))
    elif rows * columns * factor**2 < fewest:
        grow = sqrt(fewest / (height * width)) / factor
        rows, columns = ceil(height * grow), ceil(width * grow)
    return rows * factor, columns * factor


class Pixels:
    """How pictures or frames are cut, by the entries of a processor.

    :param known: fewest and most pixels, where they do not say.
    """

    def __init__(self, entries: Mapping[str, Any], vision: Any, known: tuple[int, int]):
        size = entries.get("size") if isinstance(entries.get("size"), Mapping) else {}
        self.fewest = entries.get("min_pixels") or size.get("shortest_edge") or known[0]
        self.most = entries.get("max_pixels") or size.get("longest_edge") or known[1]
        self.settings = ImageSettings.model_validate({k: v for k, v in entries.items() if k != "size"})
        self.patch, self.merge, self.depth = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size

    def patches(self, frames: Sequence[Any]) -> tuple[Tensor, tuple[int, int, int]]:
        """Pictures of one size, which follow each other, as patches.

        :return: (patches, channels * frames * height * width) float32, neighbours that merge behind one another, and
            how many there are in time, rows and columns.
        """
        settings, unit, merge = self.settings, self.patch, self.merge
        size = frames[0].height, frames[0].width
        if settings.do_resize:
            size = smart_size(*size, unit * merge, self.fewest, self.most)
            resample = BICUBIC if settings.resample is None else settings.resample
            frames = [resize(frame, size, resample) for frame in frames]
        scale = settings.rescale_factor if settings.do_rescale else None
        mean, std = (settings.image_mean, settings.image_std) if settings.do_normalize else (None, None)
        values = [normalize(np.asarray(frame), scale, mean, std) for frame in frames]
        values += [values[-1]] * (-len(values) % self.depth)  # a picture is a film of one frame
        rows, columns = size[0] // unit, size[1] // unit
        cut = np.stack(values).reshape(
            -1, self.depth, 3, rows // merge, merge, unit, columns // merge, merge, unit
        )  # time, depth, channels, then rows and columns of merged patches, within these, within a patch
        cut = cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
        grid = len(cut), rows, columns
        return torch.from_numpy(np.ascontiguousarray(cut).reshape(len(cut) * rows * columns, -1)), grid


class Qwen2VLInputs(InputProcessor):
    modalities = {"image": None, "video": None}
    embeddable = ("image", "video")
    timed: ClassVar[bool] = False
    """Whether the time axis counts seconds."""

    def __init__(self, config: Qwen2VLConfig, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        super().__init__(config, text, files, tokenizer)
        vision, films = config.vision_config, files.settings("video_processor")
        self.unit = vision.spatial_merge_size**2
        self.images = Pixels(files.settings(), vision, IMAGE_PIXELS)
        self.films = Pixels(films, vision, FRAME_PIXELS)
        self.fps, self.fewest, self.most = (
            films.get("fps") or 2.0,
            films.get("min_frames", 4),
            films.get("max_frames", 768),
        )

    def placeholder(self, modality: str) -> str:
        return f"<|vision_start|><|{modality}_pad|><|vision_end|>"

    def placeholder_id(self, modality: str) -> int:
        return self.config.image_token_id if modality == "image" else self.config.video_token_id

    def image(self, image) -> MediaItem:
        patches, grid = self.images.patches([to_rgb(image, background=(255, 255, 255))])
        return self._item("image", grid, {"pixel_values": patches})

    def pick_frames(self, total: int, fps: float | None) -> Sequence[int]:
        depth, wanted = self.films.depth, float(total)
        if fps:
            wanted = max(total / fps * self.fps, self.fewest)
        count = floor(min(wanted, self.most, total) / depth) * depth if fps or total > self.most else total
        return range(total) if count in (0, total) else [place * total // count for place in range(count)]

    def video(self, video: Video) -> MediaItem:
        patches, grid = self.films.patches([from_array(frame) for frame in video.frames])
        tensors = {"pixel_values_videos": patches}
        if self.timed:
            fps = video.fps * len(video.indices) / video.total if video.fps else UNKNOWN_FPS
            tensors["second_per_grid_ts"] = torch.tensor(self.films.depth / fps)
        return self._item("video", grid, tensors)

    def embedded(self, modality: str, embeds: Tensor, extra: Mapping[str, Any]) -> MediaItem:
        """Rows of the caller's; `image_grid_thw` or `video_grid_thw` tells their patches in time, rows and columns."""
        name = f"{modality}_grid_thw"
        grid = torch.as_tensor(extra.get(name, ())).flatten().tolist()
        if len(grid) != 3 or len(embeds) * self.unit != grid[0] * grid[1] * grid[2]:
            raise ValueError(
                f"{name} is {grid} beside {len(embeds)} rows; give the item as {{'{modality}_embeds': rows, '{name}': "
                f"(time, rows, columns)}} of its patches, {self.unit} of which make a row"
            )
        tensors = {"second_per_grid_ts": torch.tensor(float(extra.get("second_per_grid_ts", 1.0)))}
        return self._item(modality, tuple(grid), tensors if self.timed and modality == "video" else {}, embeds)

    def beside_rows(self, item: MediaItem) -> dict[str, Any]:
        return {name: value for name, value in item.tensors.items() if not name.startswith("pixel_values")}

    def _item(self, modality: str, grid: tuple, tensors: dict[str, Tensor], embeds: Tensor | None = None) -> MediaItem:
        ids = [self.placeholder_id(modality)] * (grid[0] * grid[1] * grid[2] // self.unit)
        return MediaItem(modality, ids, {**tensors, f"{modality}_grid_thw": torch.tensor(grid)}, embeds=embeds)

    def finish(self, expanded: Expanded) -> Expanded:
        """Positions in time, rows and columns; a text's are the same on all three."""
        if not expanded.media:
            return expanded
        merge, axes, done, next_position = self.images.merge, [], 0, 0
        for placed in expanded.media:
            axes.append(
                np.broadcast_to(np.arange(next_position, next_position + placed.start - done), (3, placed.start - done))
            )
            next_position += placed.start - done
            time, rows, columns = placed.item.tensors[f"{placed.item.modality}_grid_thw"].tolist()
            found = np.indices((time, rows // merge, columns // merge)).reshape(3, -1)
            if self.timed and placed.item.modality == "video":
                pace = self.config.vision_config.tokens_per_second * float(placed.item.tensors["second_per_grid_ts"])
                found[0] = (found[0] * np.float32(pace)).astype(np.int64)
            axes.append(found + next_position)
            next_position, done = int(axes[-1].max()) + 1, placed.end
        left = len(expanded.token_ids) - done
        axes.append(np.broadcast_to(np.arange(next_position, next_position + left), (3, left)))
        return Expanded(expanded.token_ids, expanded.media, axes=np.concatenate(axes, axis=1).astype(np.int32))


class Qwen2_5VLInputs(Qwen2VLInputs):
    timed = True


class Qwen2VL(MediaLM):
    num_axes = 3
    tower: type[nn.Module] = Qwen2VisionTower

    def __init__(self, cfg: Qwen2VLConfig, language: nn.Module):
        super().__init__(language)
        self.visual = self.tower(cfg.vision_config)

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        grids = [tuple(item[f"{modality}_grid_thw"].tolist()) for item in items]
        return self.visual(torch.cat([item[name] for item in items]), grids)


class Qwen2_5VL(Qwen2VL):
    tower = Qwen2_5VisionTower


def reference(name: str, entries: dict[str, Any]) -> nn.Module:
    """transformers' class, given padded patches and no kinds of tokens, which its processor would give."""
    import transformers

    def tell(model, args, kwargs):
        ids, config = args[0] if args else kwargs["input_ids"], model.config
        for pixels, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            if pixels in kwargs:
                counts = kwargs[grids].prod(-1).tolist()
                kwargs[pixels] = torch.cat([rows[:n] for rows, n in zip(kwargs[pixels], counts, strict=True)])
                kwargs["mm_token_type_ids"] = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
        return args, kwargs

    found = getattr(transformers, name)
    config = found.config_class(**entries)
    config._attn_implementation = "eager"
    model = found(config)
    model.register_forward_pre_hook(tell, with_kwargs=True)
    return model


def qwen2_vl(entries: dict[str, Any]) -> nn.Module:
    return reference("Qwen2VLForConditionalGeneration", entries)


def qwen2_5_vl(entries: dict[str, Any]) -> nn.Module:
    return reference("Qwen2_5_VLForConditionalGeneration", entries)


RENAME = {
    "model.visual.": "visual.",
    "model.language_model.": "language_model.model.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
"""Names of transformers 5, and of the published checkpoints."""

TINY_TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "rope_theta": 5000.0,
}
TINY_TOWER = {"depth": 3, "num_heads": 2, "patch_size": 4, "hidden_act": "quick_gelu"}


@hookimpl
def register_architectures() -> list[Architecture]:
    first, second = "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
    ids = {"image_token_id": 318, "video_token_id": 319, "vision_start_token_id": 316, "vision_end_token_id": 317}
    old = {**TINY_TOWER, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    new = {**TINY_TOWER, "hidden_size": 32, "intermediate_size": 56, "out_hidden_size": 64, "hidden_act": "silu",
           "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}  # fmt: skip
    tied = {"text_config": {**TINY_TEXT, "rope_theta": 500.0}, "tie_word_embeddings": True}
    return [
        Architecture(
            name,
            model,
            config,
            rename=RENAME,
            ignore=("*.rotary_emb.inv_freq", "*.rotary_pos_emb.inv_freq"),
            inputs=inputs,
            language=language_entries,
            reference=made,
            tiny={**ids, "text_config": TINY_TEXT, "vision_config": tower},
            files={"preprocessor_config.json": {"min_pixels": 256, "max_pixels": 1600, "patch_size": 4}},
            variants={"tied": tied},
        )
        for name, model, config, inputs, made, tower in (
            (first, Qwen2VL, Qwen2VLConfig, Qwen2VLInputs, qwen2_vl, old),
            (second, Qwen2_5VL, Qwen2_5VLConfig, Qwen2_5VLInputs, qwen2_5_vl, new),
        )
    ]
