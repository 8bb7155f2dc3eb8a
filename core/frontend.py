"""What `LLM` and `AsyncLLM` share: make the engine, turn prompts into requests, and requests into outputs."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from modelport.config import EngineConfig
from modelport.engine.adapters import AdapterShelf
from modelport.engine.detokenizer import Detokenizer
from modelport.engine.replicas import start_engine
from modelport.inputs.media import MediaLimits
from modelport.inputs.multimodal import MediaReader, all_spans, marks, place_media, render_with_media
from modelport.inputs.processor import Expanded, MediaItem, PlacedItem, ProcessorFiles
from modelport.inputs.prompts import PromptReader
from modelport.inputs.tokenizer import Tokenizer, load_tokenizer
from modelport.loading.checkpoint import read_config, resolve
from modelport.loading.model import Description, describe
from modelport.modeling.adapters import Adapter
from modelport.plugin import PluginError, Plugins, load_plugins
from modelport.request import CompletionOutput, LoRARequest, Prompt, Request, RequestOutput
from modelport.sampling_params import SamplingParams
from modelport.settings import engine_config as engine_config

Message = Mapping[str, Any]


@dataclass
class Job:
    """A prompt that the user gave, and the `n` requests made of it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    requests: list[Request] = field(default_factory=list)
    lora_request: LoRARequest | None = None

    @property
    def finished(self) -> bool:
        return all(request.finished for request in self.requests)

    def output(self) -> RequestOutput:
        """What there is so far."""
        first = self.requests[0]
        wanted = self.params.prompt_logprobs is not None
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            [self._completion(request) for request in self.requests],
            self.finished,
            list(first.prompt_logprobs) if wanted else None,
            first.metrics,
            first.metrics.num_cached_tokens,
            self.encoder_prompt,
            self.encoder_prompt_token_ids,
            self.lora_request,
        )

    def _completion(self, request: Request) -> CompletionOutput:
        wanted = self.params.logprobs is not None
        if request.detokenizer is not None:
            request.text += request.detokenizer.delta()  # never more than a stop string would leave
        return CompletionOutput(
            request.index,
            request.text,
            request.output_token_ids,
            request.cumulative_logprob if wanted else None,
            list(request.logprobs) if wanted else None,
            request.finish_reason,
            request.stop_reason,
        )


class Frontend:
    """An engine with its tokenizer; makes `Job`s of prompts.

    :param progress: show a bar while weights load.
    :param plugins: loaded plugins to use; they are loaded as `settings` say when not given.
    """

    def __init__(self, settings: EngineConfig, progress: bool = False, plugins: Plugins | None = None):
        self.settings = settings
        self.plugins = plugins or load_plugins(extra=settings.plugins, blocked=settings.blocked_plugins)
        checkpoint = resolve(
            settings.model,
            settings.revision,
            self.plugins,
            load_format=settings.load_format,
            trust_remote_code=settings.trust_remote_code,
        )
        raw_config = read_config(checkpoint, self.plugins)
        about = describe(checkpoint, raw_config, self.plugins, settings)
        self.config = about.text
        self.tokenizer: Tokenizer | None = None
        if not settings.skip_tokenizer_init:
            source, source_config = checkpoint, raw_config
            if settings.tokenizer is not None:
                source = resolve(
                    settings.tokenizer,
                    None,
                    self.plugins,
                    load_format="auto",
                    trust_remote_code=settings.trust_remote_code,
                )
                source_config = {}
            self.tokenizer = load_tokenizer(source, source_config, self.plugins)
        self._generation = _generation_config(checkpoint.path)
        self._eos = self._eos_ids()
        self.engine = start_engine(about, self.plugins, settings, progress)
        self.engine.token_text = self.tokenizer.token if self.tokenizer is not None else None
        self.media = self._media_reader(about) if about.architecture.inputs is not None else None
        self._reader = PromptReader(
            self.tokenizer, self.config, self._generation, self.engine.max_model_len, self.media
        )
        self.shelf = self._shelf() if settings.takes_adapters else None
        self._random = random.Random(settings.seed)
        self._ids = itertools.count()

    def default_params(self) -> SamplingParams:
        """vLLM's defaults, with what the checkpoint's `generation_config.json` recommends."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        found = {name: self._generation[name] for name in names if self._generation.get(name) is not None}
        if self._generation.get("do_sample") is False:
            found = {k: v for k, v in found.items() if k == "repetition_penalty"}
        return SamplingParams(**found)

    def _shelf(self) -> AdapterShelf:
        settings = self.settings
        if self.engine.adapters is None:
            raise PluginError("enable_lora: no plugin serves adapters; is the plugin 'lora' blocked?")

        def find(path: str) -> Path:
            return resolve(path, None, self.plugins).path

        return AdapterShelf(self.engine.adapters, find, settings.max_cpu_loras, settings.lora_modules)

    def adapter(self, wanted: LoRARequest | str | None) -> tuple[LoRARequest | None, Adapter | None]:
        """Read an adapter, if that has not been done before.

        :raises ValueError: adapters are not enabled, or it cannot be served.
        :raises FileNotFoundError: it is not there.
        """
        if wanted is None:
            return None, None
        if not isinstance(wanted, LoRARequest | str):
            raise TypeError(f"lora_request must be a LoRARequest, not {type(wanted).__name__}: {wanted!r}")
        if self.shelf is None:
            raise ValueError(f"lora_request={wanted!r}: this engine takes no adapters; make it with enable_lora=True")
        return self.shelf.get(wanted)

    def job(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None = None,
        lora_request: LoRARequest | str | None = None,
    ) -> Job:
        """Check a prompt and its parameters, and make requests of them; nothing runs yet.

        :raises ValueError: empty, too long, token ids outside the vocabulary, parameters or adapters that do not fit.
        :raises TypeError: a prompt or parameters of another type.
        """
        params = self.default_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, not {type(params).__name__}: {params!r}")
        lora_request, adapter = self.adapter(lora_request)
        encoder_text, encoder_ids, expanded = None, None, None
        if self.engine.has_encoder:
            (encoder_text, encoder_ids), (text, ids) = self._reader.read_pair(prompt)
        elif self.media is not None:
            text, expanded = self._reader.read_media(prompt)
            if adapter is not None:
                expanded = _marked(expanded, adapter)
            ids = expanded.token_ids
        else:
            text, ids = self._reader.read(prompt)
        params.validate_vocab(self.config.vocab_size)
        if params.logits_processors and self.engine.is_remote:
            raise ValueError(
                "logits_processors are functions, which worker processes are not sent; leave them out, or use "
                'executor="inproc"'
            )
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise ValueError("stop strings and bad_words need a tokenizer; use stop_token_ids, or load one")
        request_id = str(next(self._ids)) if request_id is None else request_id
        job = Job(request_id, text, ids, params, encoder_text, encoder_ids, lora_request=lora_request)
        if expanded is not None:
            ids = self._known_ids(expanded, params)
        limit = self.engine.max_model_len
        total = limit if params.max_tokens is None else min(limit, len(ids) + params.max_tokens)
        seed = params.seed if params.seed is not None else self._random.getrandbits(62)
        forced = self._reader.forced_tokens(len(ids), total) if encoder_ids is not None else {}
        bad_words = tuple(params.bad_words_token_ids(self._encode_word))
        for index in range(params.n):
            job.requests.append(
                Request(
                    request_id if params.n == 1 else f"{request_id}-{index}",
                    list(ids),
                    len(ids),
                    params,
                    seed + index,
                    self._eos,
                    total,
                    Detokenizer(self.tokenizer, params) if self.tokenizer is not None and params.detokenize else None,
                    bad_words,
                    index,
                    job.requests[0] if index else None,
                    encoder_token_ids=encoder_ids or [],
                    forced_token_ids=forced,
                    media=expanded.media if expanded else (),
                    spans=all_spans(expanded) if expanded else (),
                    marks=marks(expanded) if expanded else (),
                    axes=expanded.axes if expanded else None,
                    adapter=adapter,
                )
            )
        self.engine.check_media(job.requests[0])
        return job

    def _known_ids(self, expanded: Expanded, params: SamplingParams) -> list[int]:
        """The prompt's ids, 0 for those outside the vocabulary whose embeddings media take the place of."""
        vocab = self.config.vocab_size
        outside = [place for place, token in enumerate(expanded.token_ids) if not 0 <= token < vocab]
        ids = list(expanded.token_ids)
        items = expanded.media if outside else ()
        kept = {placed.start + place for placed in items for place in _without_rows(placed.item)}
        for place in outside:
            ids[place] = ids[place] if place in kept else 0
        if params.prompt_logprobs is not None and outside:
            raise ValueError("prompt_logprobs: placeholders of media have no place in this model's vocabulary")
        return ids

    def _media_reader(self, about: Description) -> MediaReader:
        folder, settings = about.checkpoint.path, self.settings
        files = ProcessorFiles(folder, settings.mm_processor_kwargs)
        processor = about.architecture.inputs(about.config, about.text, files, self.tokenizer)
        allowed = settings.allowed_local_media_path
        limits = MediaLimits(
            allowed_local_path=None if allowed is None else Path(allowed),
            allowed_domains=settings.allowed_media_domains,
        )
        most = settings.limit_mm_per_prompt
        return MediaReader(processor, limits, most, processor.row_width, about.architecture.name)

    def chat_prompt(self, messages: Sequence[Message], options: Mapping[str, Any], trusted: bool = True) -> Prompt:
        """Token ids of a conversation, by the model's chat template (which writes its own special tokens).

        :param trusted: whether messages may name local files.
        :raises ValueError: no tokenizer, no template, or messages that the template refuses.
        """
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer; do not set skip_tokenizer_init")
        messages, media = place_media(messages)
        if self.media is None:
            if media:
                raise ValueError(f"the messages hold {' and '.join(sorted(media))}, and this model takes text only")
            text = self.tokenizer.apply_chat_template(messages, **options)
            return {"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}
        self.media.check_kinds(media)
        text = render_with_media(self.media.processor, self.tokenizer, messages, media, options)
        ids = self.media.processor.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids, "multi_modal_data": media, "trusted": trusted}

    def _encode_word(self, word: str) -> list[int]:
        return self.tokenizer.encode(word, add_special_tokens=False)

    def _eos_ids(self) -> tuple[int, ...]:
        found: dict[int, None] = {}
        own = [self.tokenizer.eos_token_id, *self.tokenizer.turn_end_ids] if self.tokenizer is not None else None
        for ids in (own, self.config.eos_token_id, self._generation.get("eos_token_id")):
            for token in ids if isinstance(ids, list) else [ids]:
                if token is not None:
                    found[token] = None
        return tuple(found)


def _marked(expanded: Expanded, adapter: Adapter) -> Expanded:
    """With media that are told apart from the same ones under another adapter, which may change their encoder too."""
    media = tuple(
        PlacedItem(p.start, replace(p.item, digest=blake2b(p.item.digest + adapter.digest, digest_size=16).digest()))
        for p in expanded.media
    )
    return replace(expanded, media=media)


def _without_rows(item: MediaItem) -> set[int]:
    """Places of an item whose tokens have embeddings of their own."""
    return set(range(len(item.token_ids))) - set(item.row_places.tolist())


def _generation_config(path) -> dict[str, Any]:
    file = path / "generation_config.json" if path.is_dir() else None
    if file is None or not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    return found if isinstance(found, dict) else {}
