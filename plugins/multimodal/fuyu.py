"""Fuyu: patches of an image through one linear, row by row, into Persimmon (adept.ai/blog/fuyu-8b).

Decisions: the image stands before the text, where the published processor puts it, whether the prompt has its
placeholder or not; with a tokenizer the prompt ends with the token that begins an answer, as there. Boxes and points
in a prompt stay the text that they are.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelport.config import MultimodalConfig, TextConfig
from modelport.inputs.images import ImageSettings, normalize, patches, resize
from modelport.inputs.processor import Expanded, InputProcessor, MediaItem, ProcessorFiles
from modelport.inputs.tokenizer import Tokenizer
from modelport.modeling import Linear, MediaLM
from modelport.plugin import Architecture, hookimpl

modelport_api = 1
PLACEHOLDER = "|SPEAKER|"
ANSWER = "<0x04>"
NEWLINE_AFTER = 8
"""The published id of `|NEWLINE|` is the placeholder's and this; of use where there is no tokenizer to ask."""
BOS = 1


class FuyuConfig(MultimodalConfig):
    patch_size: int = 30
    num_channels: int = 3
    image_token_id: int = 71011


class FuyuImageSettings(ImageSettings):
    size: dict[str, int] = {"height": 1080, "width": 1920}
    resample: int | None = 2
    padding_value: float = 1.0
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)


def language_entries(raw: dict[str, Any]) -> dict[str, Any]:
    """The language model's entries; the first published files have them beside Fuyu's own."""
    entries = raw.get("text_config") or {key: raw[key] for key in raw if key not in ("architectures", "model_type")}
    return {**entries, "architectures": ["PersimmonForCausalLM"], "model_type": "persimmon"}


class FuyuInputs(InputProcessor):
    modalities = {"image": 1}
    embeddable = ("image",)

    def __init__(self, config: FuyuConfig, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        super().__init__(config, text, files, tokenizer)
        self.images = FuyuImageSettings.model_validate(files.settings())
        self.newline = config.image_token_id + NEWLINE_AFTER
        self.answer = None
        if tokenizer is not None:
            self.newline, self.answer = (
                tokenizer.encode(token, add_special_tokens=False)[-1] for token in ("|NEWLINE|", ANSWER)
            )
        self.bos = text.bos_token_id if isinstance(text.bos_token_id, int) else BOS

    def placeholder(self, modality: str) -> str:
        return PLACEHOLDER

    def placeholder_id(self, modality: str) -> int:
        return self.config.image_token_id

    def image(self, image) -> MediaItem:
        settings, size = self.images, self.config.patch_size
        most = settings.size["height"], settings.size["width"]
        if settings.do_resize and (image.height > most[0] or image.width > most[1]):
            scale = min(most[0] / image.height, most[1] / image.width)
            image = resize(image, (int(image.height * scale), int(image.width * scale)), settings.resample)
        pixels = np.asarray(image)
        rows, columns = ceil(pixels.shape[0] / size), ceil(pixels.shape[1] / size)
        beside = (0, rows * size - pixels.shape[0]), (0, columns * size - pixels.shape[1]), (0, 0)
        pixels = np.pad(pixels, beside, constant_values=int(settings.padding_value))  # a level, so before scaling
        scale = settings.rescale_factor if settings.do_rescale else None
        mean, std = (settings.image_mean, settings.image_std) if settings.do_normalize else (None, None)
        cut = patches(normalize(pixels, scale, mean, std), (size, size)).transpose(0, 2, 3, 1)  # channels last
        line = [self.config.image_token_id] * columns + [self.newline]
        return MediaItem(
            "image",
            [*line * rows, self.bos],
            {"pixel_values": torch.from_numpy(np.ascontiguousarray(cut).reshape(rows * columns, -1))},
            is_row=[*([True] * columns + [False]) * rows, False],
        )

    def embedded(self, modality: str, embeds: Tensor, extra: Mapping[str, Any]) -> MediaItem:
        """The caller's rows are of one line of patches, unless `image_columns` says how many a line has."""
        columns = int(extra.get("image_columns", len(embeds)))
        if columns < 1 or len(embeds) % columns:
            raise ValueError(f"image_columns={columns} does not divide the {len(embeds)} rows of image_embeds")
        lines = len(embeds) // columns
        ids = [*([self.config.image_token_id] * columns + [self.newline]) * lines, self.bos]
        return MediaItem("image", ids, is_row=[*([True] * columns + [False]) * lines, False], embeds=embeds)

    def beside_rows(self, item: MediaItem) -> dict[str, Any]:
        return {"image_columns": list(item.is_row).index(False)}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The placeholder apart from the text, which a tokenizer would begin otherwise behind it."""
        before, found, after = text.partition(PLACEHOLDER)
        if not found or before:
            return super().encode(text, add_special_tokens)
        return [self.config.image_token_id, *super().encode(after, add_special_tokens=False)]

    def expand(self, token_ids: list[int], items: Mapping[str, Any]) -> Expanded:
        """The image, and what begins a text only behind it; then the text, and the beginning of the answer."""
        if items.get("image"):
            here = self.config.image_token_id
            token_ids = token_ids[1:] if token_ids[0] == self.bos else token_ids
            token_ids = token_ids if here in token_ids else [here, *token_ids]
            if self.answer is not None and token_ids[-1] != self.answer:
                token_ids = [*token_ids, self.answer]
        return super().expand(token_ids, items)


class Fuyu(MediaLM):
    """A linear, and the language model."""

    def __init__(self, cfg: FuyuConfig, language: nn.Module):
        super().__init__(language)
        self.vision_embed_tokens = Linear(cfg.patch_size**2 * cfg.num_channels, self.hidden_size, bias=True)

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        several = [item["pixel_values"] for item in items]
        weight_type = self.vision_embed_tokens.bias.dtype
        rows = self.vision_embed_tokens(torch.cat(several).to(weight_type))
        return list(rows.split([len(one) for one in several]))


RENAME = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_embed_tokens.": "vision_embed_tokens.",
}
"""Names of transformers 5; published checkpoints have ours."""


@hookimpl
def register_architectures() -> list[Architecture]:
    text = {
        "model_type": "persimmon",
        "rope_theta": 25000.0,  # transformers 5 lost the released class's default
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    return [
        Architecture(
            "FuyuForCausalLM",
            Fuyu,
            FuyuConfig,
            rename=RENAME,
            ignore=("*.rotary_emb.inv_freq",),
            inputs=FuyuInputs,
            language=language_entries,
            reference="transformers:FuyuForCausalLM",
            tiny={"text_config": text, "patch_size": 6, "image_token_id": 303},
            files={"preprocessor_config.json": {"size": {"height": 24, "width": 48}}},
            variants={"no_qk_norm": {"text_config": {**text, "qk_layernorm": False}}},
        )
    ]
