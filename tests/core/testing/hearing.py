"""A small model that hears, and ones like it that are wrong in one way each: what the checks of media must find."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modelport.config import MultimodalConfig
from modelport.inputs.media import Audio
from modelport.inputs.processor import Expanded, InputProcessor, MediaItem
from modelport.modeling import Linear, MediaLM
from modelport.plugin import Architecture
from modelport.plugins.text.llama import TINY

FRAME = 100  # samples of a row
HERE = 319
ENTRIES = {"text_config": {**TINY, "vocab_size": 320, "model_type": "llama"}, "audio_token_id": HERE}


class HearingConfig(MultimodalConfig):
    audio_token_id: int = HERE


class HearingInputs(InputProcessor):
    modalities = {"audio": None}
    embeddable = ("audio",)

    def placeholder(self, modality: str) -> str:
        return "<sound>"

    def placeholder_id(self, modality: str) -> int:
        return self.config.audio_token_id

    def audio(self, audio: Audio) -> MediaItem:
        samples = torch.from_numpy(audio.samples[: len(audio.samples) // FRAME * FRAME]).reshape(-1, FRAME)
        if not len(samples):
            raise ValueError(f"a sound of {len(audio.samples)} samples is shorter than {FRAME}")
        tensors = {"samples": samples, "num_frames": torch.tensor(len(samples))}
        return MediaItem("audio", [self.placeholder_id("audio")] * len(samples), tensors)


class Hearing(MediaLM):
    def __init__(self, cfg: HearingConfig, language: nn.Module):
        super().__init__(language)
        self.ear = Linear(FRAME, self.hidden_size)

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        return [self.ear(item["samples"]) for item in items]


class Reference(nn.Module):
    def __init__(self, entries: dict[str, Any]):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.language_model = LlamaForCausalLM(LlamaConfig(**entries["text_config"]))
        self.ear = nn.Linear(FRAME, entries["text_config"]["hidden_size"], bias=False)

    def forward(
        self,
        input_ids: Tensor,
        use_cache: bool = False,
        samples: Tensor | None = None,
        num_frames: Sequence[int] = (),
    ) -> Any:
        x = self.language_model.get_input_embeddings()(input_ids)
        if samples is not None:
            rows = [self.ear(sound[:count]) for sound, count in zip(samples, num_frames, strict=True)]
            x = x.masked_scatter((input_ids == HERE)[..., None], torch.cat(rows))
        return self.language_model(inputs_embeds=x, use_cache=use_cache)


class Tired(Hearing):
    """What it makes of a sound depends on how often it was asked before."""

    def __init__(self, cfg: HearingConfig, language: nn.Module):
        super().__init__(cfg, language)
        self.calls = itertools.count()

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        return [rows * 0.9 ** next(self.calls) for rows in super().embed_media(modality, items)]


class Short(HearingInputs):
    """Rows of the caller's lose the last one's place."""

    def embedded(self, modality: str, embeds: Tensor, extra: Mapping[str, Any]) -> MediaItem:
        return super().embedded(modality, embeds[:-1], extra)


class Lenient(HearingInputs):
    """Items without a placeholder are left out."""

    def expand(self, token_ids: list[int], items: Mapping[str, Sequence[MediaItem]]) -> Expanded:
        count = token_ids.count(HERE)
        return super().expand(token_ids, {modality: several[:count] for modality, several in items.items()})


class Unsorted(HearingInputs):
    """Items are put in by their length."""

    def expand(self, token_ids: list[int], items: Mapping[str, Sequence[MediaItem]]) -> Expanded:
        by_length = {m: sorted(several, key=lambda item: len(item.token_ids)) for m, several in items.items()}
        return super().expand(token_ids, by_length)


class Restless(HearingInputs):
    """A moment is added to each sound, so that none is what it was before."""

    moments = itertools.count()

    def finish(self, expanded: Expanded) -> Expanded:
        moment = next(self.moments).to_bytes(32, "little")
        placed = [replace(p, item=replace(p.item, digest=moment)) for p in expanded.media]
        return replace(expanded, media=tuple(placed))


def hearing(**changes: Any) -> Architecture:
    fields = {"model": Hearing, "inputs": HearingInputs, **changes}
    return Architecture(
        "HearingForCausalLM",
        config=HearingConfig,
        language="text_config",
        rename={"lm_head.": "language_model.lm_head."},
        ignore=("*.rotary_emb.inv_freq",),
        reference=Reference,
        tiny=ENTRIES,
        **fields,
    )
