"""LLaVA 1.5: states of a CLIP or SigLIP tower, through two linears, in place of `<image>` (arXiv 2310.03744).

With Pixtral's tower it is Pixtral as transformers has it: images of any size, each row of patches followed by a token
that breaks the line, which keeps its own embedding.
"""

from collections.abc import Mapping
from math import ceil, floor
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from modelport.config import MultimodalConfig, TextConfig
from modelport.inputs.images import BICUBIC, ImageSettings, normalize, preprocess, resize, to_rgb
from modelport.inputs.processor import InputProcessor, MediaItem, ProcessorFiles
from modelport.inputs.tokenizer import Tokenizer
from modelport.modeling import MLP, MediaLM
from modelport.modeling.vit import ClipVision, ClipVisionConfig, SiglipVision, SiglipVisionConfig
from modelport.plugin import Architecture, hookimpl
from modelport.plugins.multimodal.pixtral_tower import PixtralVision, PixtralVisionConfig

modelport_api = 1
CLIP_336 = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip
TOWERS = {ClipVisionConfig: ClipVision, SiglipVisionConfig: SiglipVision, PixtralVisionConfig: PixtralVision}
BREAK, END = ("[IMG_BREAK]", 12), ("[IMG_END]", 13)  # as all tokenizers of Pixtral have them


class LlavaConfig(MultimodalConfig):
    vision_config: Annotated[
        ClipVisionConfig | SiglipVisionConfig | PixtralVisionConfig, Field(discriminator="model_type")
    ]
    image_token_index: int = 32000
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    vision_feature_layer: int | tuple[int, ...] = -2
    multimodal_projector_bias: bool = True

    @model_validator(mode="before")
    @classmethod
    def _todays_spelling(cls, data: Any) -> Any:
        if "image_token_id" in data:
            data = {"image_token_index": data["image_token_id"], **data}
        vision = data.get("vision_config") or {}
        kind = vision.get("model_type", "clip_vision_model")
        return {**data, "vision_config": {**(CLIP_336 if kind == "clip_vision_model" else {}), **vision}}

    @model_validator(mode="after")
    def _lines_are_whole(self) -> "LlavaConfig":
        if isinstance(self.vision_config, PixtralVisionConfig) and self.vision_feature_select_strategy != "full":
            raise ValueError("vision_feature_select_strategy='default' would drop a patch of a tower that has no class "
                             "token; with a tower of Pixtral it must be 'full'")  # fmt: skip
        return self

    @property
    def num_layers_read(self) -> int:
        return 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)


class LlavaInputs(InputProcessor):
    modalities = {"image": None}
    embeddable = ("image",)

    def __init__(self, config: LlavaConfig, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        super().__init__(config, text, files, tokenizer)
        vision = config.vision_config
        sizes = {"size": {"shortest_edge": vision.image_size}, "crop_size": vision.image_size, "do_center_crop": True}
        self.images = ImageSettings.model_validate({**sizes, **files.settings()})
        has_class = isinstance(vision, ClipVisionConfig)
        self.extra = int(has_class and config.vision_feature_select_strategy == "full") - int(
            not has_class and config.vision_feature_select_strategy == "default"
        )

        if self.has_lines:
            tokenizer_ids = [special_id(tokenizer, *known) for known in (BREAK, END)]
            self.line_ids = (config.image_token_index, *tokenizer_ids)

    @property
    def has_lines(self) -> bool:
        return isinstance(self.config.vision_config, PixtralVisionConfig)

    def placeholder(self, modality: str) -> str:
        return "[IMG]" if self.has_lines else "<image>"

    def placeholder_id(self, modality: str) -> int:
        return self.config.image_token_index

    def image(self, image) -> MediaItem:
        if self.has_lines:
            return self.lines(image)
        pixels = torch.from_numpy(preprocess(image, self.images))
        rows = self.config.vision_config.patches + self.extra
        return MediaItem("image", [self.config.image_token_index] * rows, {"pixel_values": pixels})

    def lines(self, image) -> MediaItem:
        """An image in lines of patches."""
        image, vision = to_rgb(image, background=(255, 255, 255)), self.config.vision_config
        longest, patch = self.images.size.get("longest_edge", vision.image_size), vision.patch_size
        ratio = max(1.0, max(image.size) / longest)
        rows, columns = (ceil(floor(edge / ratio) / patch) for edge in (image.height, image.width))
        if not rows or not columns:
            raise ValueError(f"an image of {image.width} x {image.height} is too narrow to be shrunk to {longest}")
        resample = BICUBIC if self.images.resample is None else self.images.resample
        pixels = np.asarray(resize(image, (rows * patch, columns * patch), resample))
        values = normalize(pixels, self.images.rescale_factor, self.images.image_mean, self.images.image_std)
        tensors = {"pixel_values": torch.from_numpy(values), "image_sizes": torch.tensor(values.shape[1:])}
        return line_item(rows, columns, self.line_ids, tensors)

    def embedded(self, modality: str, embeds: Tensor, extra: Mapping[str, Any]) -> MediaItem:
        if self.has_lines:
            raise ValueError("rows alone do not say where an image's lines end; give the image itself")
        return super().embedded(modality, embeds, extra)


def special_id(tokenizer: Tokenizer | None, text: str, known: int) -> int:
    """The id of a special token; `known` where there is no tokenizer.

    :raises ValueError: the tokenizer does not have it as one token.
    """
    ids = [known] if tokenizer is None else tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"the tokenizer has no token {text!r}, which images need; is it this model's?")
    return ids[0]


def line_item(rows: int, columns: int, ids: tuple[int, int, int], tensors: Mapping[str, Tensor]) -> MediaItem:
    """An image of (rows, columns) rows of the model, with a token after each line.

    :param ids: of a row, of the end of a line, and of the end of the last.
    """
    row, line_break, end = ids
    tokens = ([row] * columns + [line_break]) * rows
    return MediaItem("image", [*tokens[:-1], end], tensors, is_row=([True] * columns + [False]) * rows)


class Llava(MediaLM):
    """A tower, a projector, and any language model."""

    def __init__(self, cfg: LlavaConfig, language: nn.Module):
        super().__init__(language)
        self.vision_tower = TOWERS[type(cfg.vision_config)](cfg.vision_config, cfg.vision_feature_layer)
        self.multi_modal_projector = projector(cfg, self.hidden_size)
        self.first = 1 if cfg.vision_feature_select_strategy == "default" else 0  # without the class token

    def features(self, pixels: Tensor) -> Tensor:
        """pixels: (images, channels, height, width) -> (images, rows, hidden_size)."""
        states = self.vision_tower(pixels)[:, self.first :]
        return self.multi_modal_projector(states.flatten(0, 1)).unflatten(0, states.shape[:2])

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        pixels = [item["pixel_values"] for item in items]
        if isinstance(self.vision_tower, PixtralVision):
            states = self.vision_tower(pixels)
            return list(self.multi_modal_projector(torch.cat(states)).split([len(rows) for rows in states]))
        return list(self.features(torch.stack(pixels)))


def projector(cfg: LlavaConfig, hidden_size: int) -> MLP:
    """From the states that are read, side by side, to the language model's width."""
    width = cfg.vision_config.hidden_size * cfg.num_layers_read
    bias, names = cfg.multimodal_projector_bias, ("linear_1", "linear_2")
    return MLP(width, hidden_size, cfg.projector_hidden_act, bias, names, out_size=hidden_size)


RENAME = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.": "vision_tower.",
    "vision_tower.vision_model.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
"""Names of transformers 5, and of the published checkpoints."""

TINY_TEXT = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TINY_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 30,
    "patch_size": 6,
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 30},
    "do_center_crop": True,
    "crop_size": {"height": 30, "width": 30},
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {"text_config": TINY_TEXT, "vision_config": TINY_TOWER, "image_token_index": 319}
    siglip = {**TINY_TOWER, "model_type": "siglip_vision_model"}
    pixtral = {**TINY_TOWER, "model_type": "pixtral", "image_size": 48, "hidden_act": "silu"}
    qwen = {**TINY_TEXT, "model_type": "qwen2", "use_sliding_window": False}
    return [
        Architecture(
            "LlavaForConditionalGeneration",
            Llava,
            LlavaConfig,
            rename=RENAME,
            ignore=("*.rotary_emb.inv_freq",),
            inputs=LlavaInputs,
            language="text_config",
            reference="transformers:LlavaForConditionalGeneration",
            tiny=tiny,
            files={"preprocessor_config.json": PREPROCESSOR},
            variants={
                "class_token": {"vision_feature_select_strategy": "full"},
                "several_layers": {"vision_feature_layer": [-3, -1]},
                "siglip": {"vision_config": siglip, "vision_feature_select_strategy": "full"},
                "qwen2": {"text_config": qwen},
                "pixtral": {
                    "vision_config": pixtral,
                    "vision_feature_select_strategy": "full",
                    "vision_feature_layer": -1,
                },
            },
        )
    ]
