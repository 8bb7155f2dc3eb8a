"""What a model that sees or hears says about its inputs: what becomes of an image, and what stands for it in a prompt.

Decisions: a family says how one item is prepared (`image`, `video`, `audio`) and which tokens stand for it; finding the
places in a prompt, reading files, hashing, caching, cutting into chunks are the core's. Everything here runs in the
front end, on the CPU, in threads of the callers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from pydantic import BaseModel

    from modelport.config import TextConfig
    from modelport.inputs.media import Audio, Video
    from modelport.inputs.tokenizer import Tokenizer

MODALITIES = ("image", "video", "audio")


@dataclass(frozen=True)
class MediaItem:
    """One image, video or sound, ready for the model.

    :ivar modality: "image", "video" or "audio".
    :ivar token_ids: what stands for it in the prompt; ids that take a row may lie outside the vocabulary.
    :ivar tensors: what `embed_media` reads. Same names for all items of a modality; sizes may differ.
    :ivar is_row: for each of `token_ids`, whether a row of `embed_media` takes its place; None when all do.
    :ivar spans: (start, end) of token_ids that see each other, later ones too.
    :ivar embeds: (rows, width), the rows themselves, when the caller has computed them.
    :ivar num_keys: of a model whose cross attention reads media: rows of `embed_media`, none of which takes a token's
        place; tokens from this item on see them, up to the next item that is no neighbour of it.
    :ivar digest: of the content and of what was done with it; the core fills it.
    """

    modality: str
    token_ids: Sequence[int]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    is_row: Sequence[bool] | None = None
    spans: tuple[tuple[int, int], ...] = ()
    embeds: Tensor | None = None
    num_keys: int = 0
    digest: bytes = b""

    @cached_property
    def row_places(self) -> np.ndarray:
        """(rows,) int64: which of `token_ids` take a row."""
        import numpy as np

        return np.arange(len(self.token_ids)) if self.is_row is None else np.flatnonzero(np.asarray(self.is_row))

    @property
    def num_rows(self) -> int:
        return self.num_keys or len(self.row_places)


@dataclass(frozen=True)
class PlacedItem:
    """An item in a prompt; `start` is the place of its first token."""

    start: int
    item: MediaItem

    @property
    def end(self) -> int:
        return self.start + len(self.item.token_ids)


@dataclass(frozen=True)
class Expanded:
    """A prompt with its media.

    :ivar spans: tokens that see each other besides those that the items name.
    :ivar axes: (axes, tokens) int32 rotary positions; None where they are the tokens' places.
    """

    token_ids: list[int]
    media: tuple[PlacedItem, ...]
    spans: tuple[tuple[int, int], ...] = ()
    axes: np.ndarray | None = None


class ProcessorFiles:
    """The side files of a checkpoint that say how media are prepared.

    :param folder: of the checkpoint.
    :param overrides: entries that the user gave (`mm_processor_kwargs`); they win.
    """

    def __init__(self, folder: Path, overrides: Mapping[str, Any] | None = None):
        self._folder, self.overrides = folder, dict(overrides or {})

    def read(self, name: str) -> dict[str, Any]:
        """Entries of a JSON file; {} when there is none.

        :raises ValueError: it is not a JSON object.
        """
        file = self._folder / name
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON ({error}); download it again") from None
        if not isinstance(found, dict):
            raise ValueError(f"{file} holds a {type(found).__name__}, not a JSON object")
        return found

    def settings(self, kind: str = "image_processor") -> dict[str, Any]:
        """Entries of the image processor, or of another `kind` ("video_processor", "feature_extractor").

        They stand in `preprocessor_config.json` (videos also in `video_preprocessor_config.json`), or under `kind` in
        `processor_config.json`.
        """
        own = self.read("video_preprocessor_config.json") if kind == "video_processor" else {}
        found = own or self.read("processor_config.json").get(kind) or self.read("preprocessor_config.json")
        return {**found, **self.overrides}

    @cached_property
    def processor(self) -> dict[str, Any]:
        """Entries of the processor as a whole, such as `patch_size`."""
        return {**self.read("processor_config.json"), **self.overrides}


class InputProcessor:
    """Prepares the media of one model; a family subclasses it.

    :param config: of the model.
    :param text: configuration of its language model.
    :cvar modalities: what it takes, and how many items of each a prompt may have (None: any number).
    :cvar embeddable: modalities of which a caller may give the rows of `embed_media` instead.
    :cvar longest_span: most tokens that see each other, later ones too; None for any number (`MediaItem.spans`).
    """

    modalities: ClassVar[Mapping[str, int | None]] = {"image": None}
    embeddable: ClassVar[tuple[str, ...]] = ()
    longest_span: ClassVar[int | None] = 0

    def __init__(self, config: BaseModel, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        self.config, self.text, self.files, self.tokenizer = config, text, files, tokenizer

    @property
    def row_width(self) -> int:
        """Width of the rows that `embedded` takes; of a model whose rows are more than embeddings another one."""
        return self.text.hidden_size

    # What a family says

    def placeholder(self, modality: str) -> str:
        """What stands for an item in a prompt's text before it is expanded: `"<image>"`.

        `index` is told by families whose placeholders are numbered: see `placeholder_text`.
        """
        raise NotImplementedError

    def placeholder_id(self, modality: str) -> int:
        """The token of `placeholder`."""
        raise NotImplementedError

    def image(self, image: Image) -> MediaItem:
        """Prepare one image (mode RGB).

        :raises ValueError: the image cannot be used, and why.
        """
        raise NotImplementedError

    def video(self, video: Video) -> MediaItem:
        """Prepare one video, whose frames `pick_frames` has chosen."""
        raise NotImplementedError

    def pick_frames(self, total: int, fps: float | None) -> Sequence[int]:
        """Which frames of a video are looked at.

        :param total: frames there are.
        :param fps: of the source; None when it is not known.
        """
        raise NotImplementedError

    audio_rate: ClassVar[int] = 16000
    """Samples per second that `audio` takes."""

    def audio(self, audio: Audio) -> MediaItem:
        """Prepare one sound, resampled to `audio_rate`, one channel."""
        raise NotImplementedError

    def embedded(self, modality: str, embeds: Tensor, extra: Mapping[str, Any]) -> MediaItem:
        """An item whose rows the caller gives, (rows, width).

        :param extra: what else the caller gave with them, such as `image_grid_thw`.
        """
        return MediaItem(modality, [self.placeholder_id(modality)] * len(embeds), embeds=embeds)

    def beside_rows(self, item: MediaItem) -> dict[str, Any]:
        """What a caller has to give as `extra` of `embedded` with the rows of `item`; the conformance kit asks."""
        return {}

    # What a family may change

    def placeholder_text(self, modality: str, index: int) -> str:
        """`placeholder` of item `index` (from 0) of its modality."""
        return self.placeholder(modality)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt's text, its placeholders among them."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def expand(self, token_ids: list[int], items: Mapping[str, Sequence[MediaItem]]) -> Expanded:
        """Put the items into a prompt; here: each takes the place of a placeholder, in order.

        :raises ValueError: there are more placeholders than items, or fewer.
        """
        ids = {self.placeholder_id(modality): modality for modality in self.modalities}
        counts = {modality: sum(ids.get(token) == modality for token in token_ids) for modality in self.modalities}
        for modality, count in counts.items():
            given = len(items.get(modality, ()))
            if count != given:
                raise ValueError(
                    f"the prompt has {count} placeholders {self.placeholder(modality)!r} for {given} items of "
                    f"{modality!r} in multi_modal_data; write one where each item belongs, and no other"
                )
        waiting = {modality: iter(items.get(modality, ())) for modality in self.modalities}
        expanded: list[int] = []
        placed = []
        for token in token_ids:
            modality = ids.get(token)
            if modality is None:
                expanded.append(token)
                continue
            item = next(waiting[modality])
            placed.append(PlacedItem(len(expanded), item))
            expanded.extend(item.token_ids)
        return self.finish(Expanded(expanded, tuple(placed)))

    def finish(self, expanded: Expanded) -> Expanded:
        """The last word on an expanded prompt: positions on several axes, tokens that see each other."""
        return expanded


def check_rows(embeds: Any, width: int, modality: str) -> Tensor:
    """A caller's rows as a float tensor (rows, width).

    :raises ValueError: another shape or type, or values that are not finite.
    """
    if not isinstance(embeds, Tensor) or embeds.dim() != 2 or not embeds.is_floating_point():
        shape = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(f"embeddings of {modality!r} must be a float tensor (rows, {width}), not {shape}")
    if embeds.shape[1] != width or not len(embeds):
        raise ValueError(f"embeddings of {modality!r} are {tuple(embeds.shape)}; this model's are (rows, {width})")
    if not torch.isfinite(embeds).all():
        raise ValueError(f"embeddings of {modality!r} hold NaN or infinity")
    return embeds.detach().cpu()
