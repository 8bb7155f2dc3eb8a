"""Prompts with media: from what the caller gave to token ids with items in their places.

Decisions: items are read and prepared one by one, before anything of their request runs, so that a bad one costs its
own request alone; prepared items are kept by the hash of their content, since conversations bring the same image again
and again. `digest` covers the content and all settings, so equal digests mean equal rows.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch

from modelport.inputs.media import MediaError, MediaLimits, content_hash, read_audio, read_image, read_video
from modelport.inputs.processor import MODALITIES, Expanded, InputProcessor, MediaItem, check_rows

if TYPE_CHECKING:
    from modelport.inputs.tokenizer import Tokenizer

KEPT_BYTES = 256 << 20
"""Prepared items that are kept for prompts to come."""
MOST_ITEMS = 256
"""Items of one modality in a prompt, unless the user says otherwise."""


class MediaReader:
    """Reads the media of one model's prompts.

    :param limits: of files and addresses.
    :param most: items per prompt by modality, as the user set them.
    :param width: of a row that stands in place of a token.
    """

    def __init__(self, processor: InputProcessor, limits: MediaLimits, most: Mapping[str, int], width: int, name: str):
        self.processor, self.limits, self.width = processor, limits, width
        unknown = sorted(set(most) - set(processor.modalities))
        if unknown:
            raise ValueError(f"limit_mm_per_prompt names {unknown}; this model takes {sorted(processor.modalities)}")
        self.most = {m: _least(own, most.get(m, MOST_ITEMS)) for m, own in processor.modalities.items()}
        settings = [name, processor.files.settings(), processor.files.settings("video_processor")]
        self._salt = blake2b(json.dumps(settings, sort_keys=True, default=str).encode()).digest()
        self._kept: OrderedDict[bytes, MediaItem] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def read(
        self, data: Mapping[str, Any], trusted: bool = True, room: int | None = None
    ) -> dict[str, list[MediaItem]]:
        """The items of a prompt, by modality.

        :param data: `multi_modal_data`: for each modality one item or a list.
        :param trusted: whether paths of local files may be followed.
        :param room: tokens that they have to have room in; no more are prepared than that.
        :raises ValueError: a modality that the model does not take, too many items, or one that cannot be used.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"multi_modal_data must be a dictionary such as {{'image': ...}}, not {data!r:.80}")
        self.check_kinds(data)
        found: dict[str, list[MediaItem]] = {}
        tokens = 0
        for modality, given in data.items():
            if given is None:
                continue
            several = _several(modality, given, self.width)
            if len(several) > self.most[modality]:
                raise ValueError(
                    f"the prompt has {len(several)} items of {modality!r}; at most {self.most[modality]} are taken"
                    + ("; raise limit_mm_per_prompt" if self.processor.modalities[modality] is None else "")
                )
            found[modality] = []
            for index, one in enumerate(several):
                found[modality].append(self._item(modality, one, index, trusted))
                tokens += len(found[modality][-1].token_ids)
                if room is not None and tokens > room:
                    raise ValueError(
                        f"the prompt's media up to {modality} {index} of {len(several)} have {tokens} tokens, more "
                        f"than max_model_len={room}; send fewer or smaller ones, or raise max_model_len"
                    )
        return found

    def check_kinds(self, data: Mapping[str, Any]) -> None:
        """:raises ValueError: a modality that the model does not take."""
        for modality in data:
            if modality not in self.processor.modalities:
                takes = ", ".join(map(repr, self.processor.modalities))
                raise ValueError(f"multi_modal_data has {modality!r}; this model takes {takes}")

    def _item(self, modality: str, given: Any, index: int, trusted: bool) -> MediaItem:
        name = f"{modality} {index}"
        try:
            embeds, extra = _embeds(modality, given)
            if embeds is not None:
                if modality not in self.processor.embeddable:
                    raise ValueError("this model takes no embeddings in its place")
                rows = check_rows(embeds, self.width, modality)
                item = self.processor.embedded(modality, rows, extra)
                return replace(item, digest=self._digest(modality, content_hash(rows), *map(repr, extra.items())))
            read = getattr(self, f"_{modality}")
            media = read(given, trusted, name)
            digest = self._digest(modality, content_hash(media))
            with self._lock:
                if digest in self._kept:
                    self._kept.move_to_end(digest)
                    return self._kept[digest]
            item = replace(getattr(self.processor, modality)(media), digest=digest)
            self._keep(item)
            return item
        except MediaError as error:
            raise MediaError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _image(self, given: Any, trusted: bool, name: str):
        return read_image(given, self.limits, trusted=trusted, name=name)

    def _video(self, given: Any, trusted: bool, name: str):
        return read_video(given, self.limits, self.processor.pick_frames, trusted=trusted, name=name)

    def _audio(self, given: Any, trusted: bool, name: str):
        return read_audio(given, self.limits, self.processor.audio_rate, trusted=trusted, name=name)

    def _digest(self, modality: str, content: bytes, *more: str) -> bytes:
        return blake2b(b"\0".join([self._salt, modality.encode(), content, *(m.encode() for m in more)])).digest()[:32]

    def _keep(self, item: MediaItem) -> None:
        size = _bytes(item)
        if size > KEPT_BYTES // 4:
            return
        with self._lock:
            if item.digest not in self._kept:
                self._kept[item.digest] = item
                self._bytes += size
            while self._bytes > KEPT_BYTES:
                self._bytes -= _bytes(self._kept.popitem(last=False)[1])


def with_places(processor: InputProcessor, text: str, data: Mapping[str, Sequence[Any]]) -> str:
    """A text with a placeholder in front for each item, unless it has some of its own."""
    places = [processor.placeholder_text(m, index) for m, several in data.items() for index in range(len(several))]
    return text if any(place in text for place in places) else "".join(places) + text


def marks(expanded: Expanded) -> tuple[tuple[int, int, bytes], ...]:
    """What of a prompt's keys the ids do not say (`Request.marks`): which media, and what a span holds to its end."""
    found = [(placed.start, placed.end, placed.item.digest) for placed in expanded.media]
    for start, end in all_spans(expanded):
        inside = [digest for first, last, digest in found[: len(expanded.media)] if first < end and last > start]
        ids = repr(expanded.token_ids[start:end]).encode()
        found.append((start, end, blake2b(b"\0".join([ids, *inside]), digest_size=32).digest()))
    return tuple(found)


def all_spans(expanded: Expanded) -> tuple[tuple[int, int], ...]:
    """Runs of tokens that see each other, in order."""
    own = ((p.start + start, p.start + end) for p in expanded.media for start, end in p.item.spans)
    return tuple(sorted((*expanded.spans, *own)))


def place_media(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Conversations as OpenAI's clients write them: messages whose media parts are `{"type": "image"}`, and the media.

    Known parts: `image_url`, `video_url`, `audio_url` (an address, or `{"url": address}`), `input_audio`
    (`{"data": base64, "format": ...}`), and `image`, `video`, `audio` with anything that `multi_modal_data` takes.

    :raises ValueError: a part without its data.
    """
    media: dict[str, list[Any]] = {}
    written = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple):
            parts = [_part(part, media) for part in content]
            message = {**message, "content": parts}
        written.append(message)
    return written, media


def render_with_media(
    processor: InputProcessor,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    media: Mapping[str, Sequence[Any]],
    options: Mapping[str, Any],
) -> str:
    """A conversation as text with a placeholder for each item.

    Templates that know no parts get each message as one text, its placeholders first.

    :param messages: as `place_media` wrote them.
    """
    if media:
        try:
            text = tokenizer.apply_chat_template(messages, **options)
        except ValueError:
            text = None  # the flat form tells whether the messages themselves are wrong
        if text is not None and all(
            all(text.count(processor.placeholder_text(m, i)) for i in range(len(several)))
            for m, several in media.items()
        ):
            return text
    counts = dict.fromkeys(MODALITIES, 0)
    return tokenizer.apply_chat_template([_flat(m, processor, counts) for m in messages], **options)


def _flat(message: Mapping[str, Any], processor: InputProcessor, counts: dict[str, int]) -> Mapping[str, Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return message
    places, texts = [], []
    for part in content:
        kind = part.get("type")
        if kind in counts:
            places.append(processor.placeholder_text(kind, counts[kind]))
            counts[kind] += 1
        elif kind == "text":
            texts.append(part["text"])
        else:
            return message
    return {**message, "content": "\n".join([*places, *texts])}


def _part(part: Any, media: dict[str, list[Any]]) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind == "text":
        return part
    modality = "audio" if kind == "input_audio" else kind.removesuffix("_url").removesuffix("_pil")
    if modality not in MODALITIES:
        return part
    data = part.get(kind)
    if data is None and kind == modality:
        data = next((part[key] for key in ("url", "path", "base64") if part.get(key) is not None), None)
    if isinstance(data, Mapping) and kind == "input_audio":
        if not isinstance(data.get("data"), str):
            raise ValueError(f"a content part of type 'input_audio' needs its data in base64: {part!r:.120}")
        data = f"data:audio/{data.get('format', 'wav')};base64,{data['data']}"
    elif isinstance(data, Mapping) and "url" in data:
        data = data["url"]
    if data is None:
        raise ValueError(f"a content part of type {kind!r} has no {kind!r}: {part!r:.120}")
    media.setdefault(modality, []).append(data)
    return {"type": modality}


def _several(modality: str, given: Any, width: int) -> list[Any]:
    """One item or a list of them, as a list."""
    if isinstance(given, torch.Tensor) and given.dim() == 3 and given.is_floating_point():
        is_picture = modality == "image" and given.shape[-1] != width and {given.shape[0], given.shape[-1]} & {1, 3, 4}
        return [given] if is_picture else list(given)  # embeddings (items, rows, width)
    if isinstance(given, list):
        frames = modality == "video" and given and not isinstance(given[0], list | str | bytes | Mapping | tuple)
        return [given] if frames and _is_picture(given[0]) else given
    return [given]


def _is_picture(value: Any) -> bool:
    return getattr(value, "ndim", None) == 3 or type(value).__module__.startswith("PIL.")


def _embeds(modality: str, given: Any) -> tuple[torch.Tensor | None, dict[str, Any]]:
    key = f"{modality}_embeds"
    if isinstance(given, Mapping) and key in given:
        return given[key], {name: value for name, value in given.items() if name != key}
    return (given, {}) if isinstance(given, torch.Tensor) and given.dim() == 2 else (None, {})


def _bytes(item: MediaItem) -> int:
    return sum(tensor.nbytes for tensor in item.tensors.values())


def _least(own: int | None, wanted: int) -> int:
    return wanted if own is None else min(own, wanted)
