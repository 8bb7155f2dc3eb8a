"""Qwen3-VL: Qwen2-VL's inputs and Qwen3 behind a tower whose states are read at several layers; what the inner ones say
is added behind the first blocks of the language model (DeepStack, arXiv 2406.04334).

Decisions: a row is as wide as all that is added together, the embedding first. In a film every pair of frames is an
item of its own for the language model, with the time in front as text; without a tokenizer the times are left out. They
are encoded by themselves, which is the same unless a text ends in a punctuation mark right before its film. Frames are
picked and sized as transformers has it, within a budget of pixels for the whole film, and resized with Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from math import ceil, floor, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from modelport.batch import Batch, Media
from modelport.config import MultimodalConfig, TextConfig
from modelport.inputs.images import BICUBIC, from_array, resize
from modelport.inputs.processor import Expanded, MediaItem, ProcessorFiles
from modelport.inputs.tokenizer import Tokenizer
from modelport.modeling import MLP, Embedding, LayerNorm, grid_positions
from modelport.plugin import Architecture, hookimpl
from modelport.plugins.multimodal.qwen_tower import (
    Grid,
    Patches3D,
    QwenLayer,
    QwenVisionConfig,
    check_grids,
    frames_of,
    qwen_angles,
)
from modelport.plugins.multimodal.qwen_vl import RENAME, STRETCH, UNKNOWN_FPS, Pixels, Qwen2VL, Qwen2VLInputs, reference
from modelport.plugins.text.qwen3 import Block

if TYPE_CHECKING:
    from modelport.inputs.media import Video

modelport_api = 1
IMAGE_PIXELS = 65536, 16777216
FILM_PIXELS = 128 * 32 * 32, 32 * 32 * 768
"""Fewest and most of a picture, and of all frames of a film, where the files do not say."""


class Qwen3VisionConfig(QwenVisionConfig):
    depth: int = 27
    hidden_size: int = 1152
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: int = 4304
    patch_size: int = 16
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)


class Qwen3VLConfig(MultimodalConfig):
    vision_config: Qwen3VisionConfig = Qwen3VisionConfig()
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653


def language_entries(entries: dict[str, Any]) -> dict[str, Any]:
    """Of Qwen3, which the language model is, whose rotary axes take turns."""
    inner = entries.get("text_config") or {}
    known = {"mrope_section": [24, 20, 20], "rope_theta": 500000.0}
    rope = {**known, **(inner.get("rope_parameters") or inner.get("rope_scaling") or {}), "mrope_interleaved": True}
    rope |= {"rope_theta": inner["rope_theta"]} if inner.get("rope_theta") else {}
    given = {k: v for k, v in inner.items() if k not in ("architectures", "rope_scaling", "rope_theta")}
    tied = any(found.get("tie_word_embeddings") for found in (entries, inner))
    known = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 128000, "head_dim": 128}
    return {**known, **given, "rope_parameters": rope, "tie_word_embeddings": tied}


def film_size(frames: int, height: int, width: int, factor: int, fewest: int, most: int) -> tuple[int, int]:
    """The size of each frame, a multiple of `factor`, for which all of them have `fewest` to `most` pixels together.

    :raises ValueError: frames 200 times longer than wide.
    """
    if min(height, width) < factor:
        grow = max(factor / height, factor / width)
        height, width = int(height * grow), int(width * grow)
    if max(height, width) > STRETCH * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one edge is over {STRETCH} times the other; cut or pad it")
    rows, columns = round(height / factor), round(width / factor)
    pixels = 2 * max(1, round(frames / 2)) * rows * columns * factor**2
    if pixels > most:
        shrink = sqrt(frames * height * width / most) * factor
        rows, columns = max(1, floor(height / shrink)), max(1, floor(width / shrink))
    elif pixels < fewest:
        grow = sqrt(fewest / (frames * height * width)) / factor
        rows, columns = ceil(height * grow), ceil(width * grow)
    return rows * factor, columns * factor


class Qwen3VLInputs(Qwen2VLInputs):
    embeddable = ("image",)

    def __init__(self, config: Qwen3VLConfig, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        super().__init__(config, text, files, tokenizer)
        films = files.settings("video_processor")
        self.images = Pixels(files.settings(), config.vision_config, IMAGE_PIXELS)
        self.films = Pixels({**films, "do_resize": False}, config.vision_config, FILM_PIXELS)
        self.frame_tokens = films.get("max_video_tokens", 768) if films.get("cap_pixels_per_frame") else None

    @property
    def row_width(self) -> int:
        return self.text.hidden_size * (1 + len(self.config.vision_config.deepstack_visual_indexes))

    def pick_frames(self, total: int, fps: float | None) -> Sequence[int]:
        wanted = int(total / (fps or UNKNOWN_FPS) * self.fps)
        count = min(max(wanted, self.fewest), self.most, total)
        return np.linspace(0, total - 1, count).round().astype(int).tolist()

    def video(self, video: Video) -> MediaItem:
        frames, films = [from_array(frame) for frame in video.frames], self.films
        count, factor, most = len(frames), films.patch * films.merge, films.most
        if self.frame_tokens is not None:
            least = int(films.fewest * 1.05)
            most = count * max(min(self.frame_tokens * factor**2, films.most // count), least)
        size = film_size(count, frames[0].height, frames[0].width, factor, films.fewest, most)
        resample = BICUBIC if films.settings.resample is None else films.settings.resample
        patches, grid = films.patches([resize(frame, size, resample) for frame in frames])
        seconds = [index / (video.fps or UNKNOWN_FPS) for index in video.indices]
        seconds += seconds[-1:] * (-len(seconds) % films.depth)
        ids: list[int] = []
        is_row: list[bool] = []
        for first in range(0, len(seconds), films.depth):
            time = (seconds[first] + seconds[first + films.depth - 1]) / 2
            before = [*self._time(time), self.config.vision_start_token_id]
            rows = grid[1] * grid[2] // self.unit
            ids += [*before, *[self.config.video_token_id] * rows, self.config.vision_end_token_id]
            is_row += [*[False] * len(before), *[True] * rows, False]
        tensors = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor(grid)}
        return MediaItem("video", ids, tensors, is_row)

    def _time(self, seconds: float) -> list[int]:
        return [] if self.tokenizer is None else self.tokenizer.encode(f"<{seconds:.1f} seconds>", False)

    def expand(self, token_ids: list[int], items: Mapping[str, Sequence[MediaItem]]) -> Expanded:
        """What stands around a film's placeholder goes: each pair of frames has its own."""
        around = [self.config.vision_start_token_id, self.config.video_token_id, self.config.vision_end_token_id]
        kept: list[int] = []
        for token in token_ids:
            kept.append(token)
            if kept[-3:] == around:
                kept[-3:] = [self.config.video_token_id]
        return super().expand(kept, items)

    def finish(self, expanded: Expanded) -> Expanded:
        """Positions in time, rows and columns, those of every frame from its own place on."""
        if not expanded.media:
            return expanded
        sizes: dict[int, tuple[int, int]] = {}  # place of a row -> rows and columns of its picture
        for placed in expanded.media:
            _, rows, columns = placed.item.tensors[f"{placed.item.modality}_grid_thw"].tolist()
            size = rows // self.images.merge, columns // self.images.merge
            sizes |= dict.fromkeys((placed.item.row_places + placed.start).tolist(), size)
        axes, position = [], 0
        for size, run in groupby(range(len(expanded.token_ids)), sizes.get):
            left = len(list(run))
            while left:  # pictures of one size may touch
                count = left if size is None else size[0] * size[1]
                found = np.arange(count)[None].repeat(3, 0) if size is None else np.indices((1, *size)).reshape(3, -1)
                axes.append(found + position)
                position += count if size is None else max(size)
                left -= count
        return replace(expanded, axes=np.concatenate(axes, axis=1).astype(np.int32))


class Merger(MLP):
    """Neighbouring patches become one row; the norm is applied to each patch, or `after` they have been joined."""

    def __init__(self, cfg: Qwen3VisionConfig, after: bool):
        self.width = cfg.hidden_size * cfg.spatial_merge_size**2
        names = ("linear_fc1", "linear_fc2")
        super().__init__(self.width, self.width, "gelu", bias=True, names=names, out_size=cfg.out_hidden_size)
        self.norm, self.after = LayerNorm(self.width if after else cfg.hidden_size, 1e-6), after

    def forward(self, x: Tensor) -> Tensor:
        """x: (patches, size) -> (patches / merge ** 2, out_size)."""
        x = self.norm(x.view(-1, self.width)) if self.after else self.norm(x).view(-1, self.width)
        return super().forward(x)


class Tower(nn.Module):
    """Frames are attended one by one; positions are learned for a square grid, and turn as well."""

    def __init__(self, cfg: Qwen3VisionConfig):
        super().__init__()
        size, self.merge, self.head_dim = cfg.hidden_size, cfg.spatial_merge_size, cfg.hidden_size // cfg.num_heads
        patch = (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
        self.patch_embed = Patches3D(cfg.in_channels, size, patch, bias=True)
        self.side = int(cfg.num_position_embeddings**0.5)
        self.pos_embed = Embedding(cfg.num_position_embeddings, size)

        def layer() -> QwenLayer:
            names = ("linear_fc1", "linear_fc2")
            mlp = MLP(size, cfg.intermediate_size, cfg.hidden_act, bias=True, names=names)
            return QwenLayer(size, cfg.num_heads, (LayerNorm(size, 1e-6), LayerNorm(size, 1e-6)), mlp)

        self.blocks = nn.ModuleList(layer() for _ in range(cfg.depth))
        self.merger = Merger(cfg, after=False)
        self.read = cfg.deepstack_visual_indexes
        self.deepstack_merger_list = nn.ModuleList(Merger(cfg, after=True) for _ in self.read)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """patches: (patches, channels * frames * height * width), neighbours that merge behind one another.

        :return: for each grid (frames * rows * columns / merge ** 2, (1 + layers that are read) * out).
        :raises ValueError: grids that do not fit the patches or the merging.
        """
        check_grids(grids, self.merge, len(patches))
        where = [grid_positions(*grid, self.merge, patches.device) for grid in grids]
        x = self.patch_embed.proj(patches)
        x = x + torch.cat([self._learned(places, grid) for places, grid in zip(where, grids, strict=True)]).to(x.dtype)
        angles, starts = qwen_angles(torch.cat(where), self.head_dim), frames_of(grids, x.device)
        found: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            x = block(x, starts, angles)
            if number in self.read:
                found[number] = self.deepstack_merger_list[self.read.index(number)](x)
        rows = torch.cat([self.merger(x), *(found[number] for number in sorted(found))], dim=1)
        return list(rows.split([t * h * w // self.merge**2 for t, h, w in grids]))

    def _learned(self, places: Tensor, grid: Grid) -> Tensor:
        """The table between its points, corner on corner; places: (patches, 2) -> (patches, size)."""
        shape = torch.tensor(grid[1:], device=places.device)
        at = places * ((self.side - 1) / (shape - 1).clamp(min=1))
        low = at.floor().long().clamp(max=self.side - 1)
        part, high = (at - low).float(), (low + 1).clamp(max=self.side - 1)
        found = 0.0
        for row, of_row in ((low[:, 0], 1 - part[:, 0]), (high[:, 0], part[:, 0])):
            for column, of_column in ((low[:, 1], 1 - part[:, 1]), (high[:, 1], part[:, 1])):
                found = found + self.pos_embed(row * self.side + column) * (of_row * of_column)[:, None]
        return found


class DeepBlock(Block):
    """A block behind which something is added to the rows of media; it has the parts of `block`."""

    def __init__(self, block: Block):
        nn.Module.__init__(self)
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, state: Tensor | tuple[Tensor, ...], batch: Batch) -> Tensor | tuple[Tensor, ...]:
        if isinstance(state, Tensor):
            return super().forward(state, batch)
        x, here, *later = state  # each (tokens, hidden_size)
        x = super().forward(x, batch) + here
        return (x, *later) if later else x


class Qwen3VL(Qwen2VL):
    tower = Tower

    def __init__(self, cfg: Qwen3VLConfig, language: nn.Module):
        super().__init__(cfg, language)
        layers, self.num_parts = language.model.layers, 1 + len(cfg.vision_config.deepstack_visual_indexes)
        for number in range(self.num_parts - 1):
            layers[number] = DeepBlock(layers[number])

    def merge_media(self, state: Tensor, media: Media | None) -> Tensor | tuple[Tensor, ...]:
        """Embeddings with rows in their places, and, where there are any, what the first blocks add."""
        if media is None:
            return state
        width = state.shape[1]
        first, *added = media.states.expand(-1, self.num_parts * width).to(state.dtype).split(width, dim=1)
        state = state.index_copy(0, media.rows, first)
        spread = [torch.zeros_like(state).index_copy_(0, media.rows, part) for part in added]
        return (state, *spread)


def made(entries: dict[str, Any]) -> nn.Module:
    return reference("Qwen3VLForConditionalGeneration", entries)


@hookimpl
def register_architectures() -> list[Architecture]:
    text = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [4, 2, 2],
                                "mrope_interleaved": True}}  # fmt: skip
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 56, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": 64, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    ids = {"image_token_id": 318, "video_token_id": 319, "vision_start_token_id": 316, "vision_end_token_id": 317}
    pixels = {"size": {"shortest_edge": 256, "longest_edge": 1600}, "patch_size": 4}
    return [
        Architecture(
            "Qwen3VLForConditionalGeneration",
            Qwen3VL,
            Qwen3VLConfig,
            rename=RENAME,
            ignore=("*.rotary_emb.inv_freq", "*.rotary_pos_emb.inv_freq"),
            inputs=Qwen3VLInputs,
            language=language_entries,
            reference=made,
            tiny={**ids, "text_config": text, "vision_config": vision},
            files={
                "preprocessor_config.json": pixels,
                "video_preprocessor_config.json": {"size": {"shortest_edge": 256, "longest_edge": 4800}},
            },
            variants={"tied": {"text_config": {**text, "tie_word_embeddings": True}, "tie_word_embeddings": True}},
        )
    ]
