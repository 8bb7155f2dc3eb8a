"""Gemma 3 with images: SigLIP's patches averaged into 256 soft tokens, which see each other, between two marks.

A window of a sliding layer counts from each token back, also for those of an image; published windows (512 and wider)
hold an image's 256.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor, nn

from modelport.config import MultimodalConfig, TextConfig
from modelport.inputs.images import ImageSettings, preprocess
from modelport.inputs.processor import InputProcessor, MediaItem, ProcessorFiles
from modelport.inputs.tokenizer import Tokenizer
from modelport.modeling import MediaLM, RMSNorm
from modelport.modeling.vit import SiglipVision, SiglipVisionConfig
from modelport.plugin import Architecture, hookimpl
from modelport.plugins.multimodal.paligemma import HALF, PREPROCESSOR, RENAME, TINY_GEMMA, TINY_TOWER

modelport_api = 1
PLACEHOLDER, SOFT, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
WHOLE = f"\n\n{PLACEHOLDER}{SOFT}{END}\n\n"
"""What stands for an image in a text; its soft token stands for all of them."""
BILINEAR = 2


class Gemma3Config(MultimodalConfig):
    vision_config: SiglipVisionConfig
    mm_tokens_per_image: int = 256
    image_token_index: int = 262144

    @model_validator(mode="before")
    @classmethod
    def _todays_spelling(cls, data: Any) -> Any:
        return {"image_token_index": data["image_token_id"], **data} if "image_token_id" in data else data

    @model_validator(mode="after")
    def _squares(self) -> "Gemma3Config":
        side, patches = self.side, self.vision_config.image_size // self.vision_config.patch_size
        if side * side != self.mm_tokens_per_image or patches % side:
            raise ValueError(f"mm_tokens_per_image={self.mm_tokens_per_image} are no square that divides the tower's "
                             f"{patches} x {patches} patches")  # fmt: skip
        return self

    @property
    def side(self) -> int:
        """Soft tokens in a line of an image."""
        return int(self.mm_tokens_per_image**0.5)


class Gemma3Inputs(InputProcessor):
    modalities = {"image": None}
    embeddable = ("image",)
    longest_span = None

    def __init__(self, config: Gemma3Config, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        super().__init__(config, text, files, tokenizer)
        settings, edge = files.settings(), config.vision_config.image_size
        if settings.get("do_pan_and_scan"):
            raise ValueError(
                "do_pan_and_scan=True: images are not cut into crops here; set it to false in preprocessor_config.json "
                "or give mm_processor_kwargs={'do_pan_and_scan': False}"
            )
        size = {"height": edge, "width": edge}
        known = {"size": size, "image_mean": HALF, "image_std": HALF, "resample": BILINEAR}
        self.images = ImageSettings.model_validate({**known, **settings})

    def placeholder(self, modality: str) -> str:
        return PLACEHOLDER

    def placeholder_id(self, modality: str) -> int:
        """The soft token; in text, marks and empty lines lie around it."""
        return self.config.image_token_index

    def image(self, image) -> MediaItem:
        pixels = torch.from_numpy(preprocess(image, self.images))
        return self._soft(self.config.mm_tokens_per_image, tensors={"pixel_values": pixels})

    def embedded(self, modality: str, embeds: Tensor, extra: Mapping[str, Any]) -> MediaItem:
        return self._soft(len(embeds), embeds=embeds)

    def _soft(self, count: int, **item: Any) -> MediaItem:
        return MediaItem("image", [self.config.image_token_index] * count, spans=((0, count),), **item)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return super().encode(text.replace(PLACEHOLDER, WHOLE), add_special_tokens)


class Projector(nn.Module):
    """Squares of patches to their mean, normalised, to the language model's width."""

    def __init__(self, cfg: Gemma3Config, hidden_size: int):
        super().__init__()
        vision = cfg.vision_config
        self.patches = vision.image_size // vision.patch_size  # in a line
        self.pool = nn.AvgPool2d(self.patches // cfg.side)
        self.mm_soft_emb_norm = RMSNorm(vision.hidden_size, vision.layer_norm_eps, offset=1.0)
        self.mm_input_projection_weight = nn.Parameter(torch.empty(vision.hidden_size, hidden_size), False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (images, patches, width) -> (images, soft tokens, hidden_size)."""
        pooled = self.pool(x.mT.unflatten(2, (self.patches, self.patches))).flatten(2).mT
        rows = self.mm_soft_emb_norm(pooled.flatten(0, 1)) @ self.mm_input_projection_weight
        return rows.unflatten(0, pooled.shape[:2])


class Gemma3(MediaLM):
    def __init__(self, cfg: Gemma3Config, language: nn.Module):
        super().__init__(language)
        self.vision_tower = SiglipVision(cfg.vision_config)
        self.multi_modal_projector = Projector(cfg, self.hidden_size)

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        pixels = torch.stack([item["pixel_values"] for item in items])
        return list(self.multi_modal_projector(self.vision_tower(pixels)))


def reference(entries: dict[str, Any]) -> nn.Module:
    """transformers' class, told which tokens are an image's, as its processor tells it."""
    from transformers import Gemma3Config as Config
    from transformers import Gemma3ForConditionalGeneration

    def tell(model, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        return args, {**kwargs, "token_type_ids": (ids == model.config.image_token_index).long()}

    config = Config(**entries)
    config._attn_implementation = "eager"
    model = Gemma3ForConditionalGeneration(config)
    model.register_forward_pre_hook(tell, with_kwargs=True)
    return model


@hookimpl
def register_architectures() -> list[Architecture]:
    text = {
        **TINY_GEMMA,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 24,
        "sliding_window": 20,
        "sliding_window_pattern": 3,
    }
    scaled = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1e5, "rope_local_base_freq": 100.0}
    tower = {**TINY_TOWER, "image_size": 36}
    tiny = {"text_config": text, "vision_config": tower, "mm_tokens_per_image": 9, "image_token_index": 319}
    return [
        Architecture(
            "Gemma3ForConditionalGeneration",
            Gemma3,
            Gemma3Config,
            rename=RENAME,
            ignore=("*.rotary_emb.inv_freq",),
            inputs=Gemma3Inputs,
            language="text_config",
            reference=reference,
            tiny=tiny,
            files={
                "preprocessor_config.json": {
                    **PREPROCESSOR,
                    "image_processor_type": "Gemma3ImageProcessor",
                    "size": {"height": 36, "width": 36},
                    "resample": BILINEAR,
                    "do_pan_and_scan": None,
                }
            },
            variants={
                "4b": {"text_config": {**text, **scaled}},
                "unpooled": {"mm_tokens_per_image": 36, "text_config": {**text, "sliding_window": 40}},
            },
        )
    ]
