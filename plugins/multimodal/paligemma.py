"""PaliGemma 1 and 2: SigLIP's states through one linear, before a prompt whose tokens all see each other.

The authors (arXiv 2407.07726, section 3.2) let image and prompt see all of themselves and what is generated only what
is before it. A prompt without an image is one for the language model alone, and is read as that reads it. In the layers
of Gemma 2 that slide, a token of a prompt longer than the window (4,096) does not see what lies further back; there the
authors' code also cuts what lies further ahead, and transformers cuts nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor, nn

from modelport.config import MultimodalConfig, TextConfig
from modelport.inputs.images import ImageSettings, preprocess
from modelport.inputs.processor import Expanded, InputProcessor, MediaItem, ProcessorFiles
from modelport.inputs.tokenizer import Tokenizer
from modelport.modeling import ColumnLinear, MediaLM
from modelport.modeling.vit import SiglipVision, SiglipVisionConfig
from modelport.plugin import Architecture, hookimpl

modelport_api = 1
PLACEHOLDER = "<image>"
BOS = 2  # as all tokenizers of Gemma have it; not all of them add it by themselves
HALF = (0.5, 0.5, 0.5)


class PaliGemmaConfig(MultimodalConfig):
    vision_config: SiglipVisionConfig
    image_token_index: int = 256000

    @model_validator(mode="before")
    @classmethod
    def _todays_spelling(cls, data: Any) -> Any:
        return {"image_token_index": data["image_token_id"], **data} if "image_token_id" in data else data


class PaliGemmaInputs(InputProcessor):
    modalities = {"image": None}
    embeddable = ("image",)
    longest_span = None

    def __init__(self, config: PaliGemmaConfig, text: TextConfig, files: ProcessorFiles, tokenizer: Tokenizer | None):
        super().__init__(config, text, files, tokenizer)
        edge = config.vision_config.image_size
        known = {"size": {"height": edge, "width": edge}, "image_mean": HALF, "image_std": HALF}
        self.images = ImageSettings.model_validate({**known, **files.settings()})

    def placeholder(self, modality: str) -> str:
        return PLACEHOLDER

    def placeholder_id(self, modality: str) -> int:
        return self.config.image_token_index

    def image(self, image) -> MediaItem:
        pixels = torch.from_numpy(preprocess(image, self.images))
        ids = [self.config.image_token_index] * self.config.vision_config.patches
        return MediaItem("image", ids, {"pixel_values": pixels})

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Images, then what begins a text, then the text and the end of a line, with which all prompts end."""
        before, found, after = text.rpartition(PLACEHOLDER)
        ids = []
        for index, piece in enumerate(before.split(PLACEHOLDER) if found else ()):
            ids += [self.config.image_token_index] if index else []
            ids += super().encode(piece, add_special_tokens=False) if piece else []
        ids += [self.config.image_token_index] if found else []
        begin = super().encode("", add_special_tokens=True) or [BOS]
        return ids + (begin if add_special_tokens else []) + super().encode(after + "\n", add_special_tokens=False)

    def expand(self, token_ids: list[int], items: Mapping[str, Any]) -> Expanded:
        """Images whose places the prompt does not say come before it."""
        here = self.config.image_token_index
        if items.get("image") and here not in token_ids:
            token_ids = [here] * len(items["image"]) + token_ids
        return super().expand(token_ids, items)

    def finish(self, expanded: Expanded) -> Expanded:
        return replace(expanded, spans=((0, len(expanded.token_ids)),)) if expanded.media else expanded


class Projector(nn.Module):
    def __init__(self, width: int, hidden_size: int):
        super().__init__()
        self.linear = ColumnLinear(width, hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class PaliGemma(MediaLM):
    """A tower, a linear, and a Gemma, whose scale of embeddings is not applied to an image's rows."""

    def __init__(self, cfg: PaliGemmaConfig, language: nn.Module):
        super().__init__(language)
        self.vision_tower = SiglipVision(cfg.vision_config)
        self.multi_modal_projector = Projector(cfg.vision_config.hidden_size, self.hidden_size)

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        states = self.vision_tower(torch.stack([item["pixel_values"] for item in items]))
        return list(self.multi_modal_projector(states.flatten(0, 1)).unflatten(0, states.shape[:2]))


def reference(entries: dict[str, Any]) -> nn.Module:
    """transformers' class, told where the prompt ends; nothing in the ids says so."""
    from transformers import PaliGemmaConfig as Config
    from transformers import PaliGemmaForConditionalGeneration

    def tell(model, args, kwargs):
        ids, spans = args[0] if args else kwargs["input_ids"], kwargs.pop("spans", ())
        if spans:
            kwargs["token_type_ids"] = torch.ones_like(ids)
        for start, end in spans:
            kwargs["token_type_ids"][:, start:end] = 0
        return args, kwargs

    config = Config(**entries)
    config._attn_implementation = "eager"
    model = PaliGemmaForConditionalGeneration(config)
    model.register_forward_pre_hook(tell, with_kwargs=True)
    return model


RENAME = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.": "vision_tower.",
    "vision_tower.vision_model.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
"""Names of transformers 5, and of the published checkpoints."""

TINY_GEMMA = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
TINY_TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 30,
    "patch_size": 6,
    "vision_use_head": False,
}
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "do_convert_rgb": None,
    "do_resize": True,
    "size": {"height": 30, "width": 30},
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_seq_length": 25,
    "image_mean": HALF,
    "image_std": HALF,
}


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "text_config": {**TINY_GEMMA, "model_type": "gemma"},
        "vision_config": TINY_TOWER,
        "projection_dim": 64,
        "hidden_size": 64,
        "image_token_index": 319,
    }
    # as PaliGemma 2
    second = {**TINY_GEMMA, "model_type": "gemma2", "query_pre_attn_scalar": 24, "sliding_window": 100,
              "num_key_value_heads": 2, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}  # fmt: skip
    return [
        Architecture(
            "PaliGemmaForConditionalGeneration",
            PaliGemma,
            PaliGemmaConfig,
            rename=RENAME,
            ignore=("*.rotary_emb.inv_freq",),
            inputs=PaliGemmaInputs,
            language="text_config",
            reference=reference,
            tiny=tiny,
            files={"preprocessor_config.json": PREPROCESSOR},
            variants={"2": {"text_config": second}},
        )
    ]
