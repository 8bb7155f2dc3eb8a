"""What `LLM` and `AsyncLLM` share: make the engine, turn prompts into requests, and requests into outputs."""

from __future__ import annotations

import difflib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from modelport.config import EngineConfig
from modelport.engine.detokenizer import Detokenizer
from modelport.engine.engine import Engine
from modelport.inputs.prompts import PromptReader
from modelport.inputs.tokenizer import Tokenizer, load_tokenizer
from modelport.loading.checkpoint import read_config, resolve
from modelport.loading.model import describe
from modelport.plugin import Plugins, load_plugins
from modelport.request import CompletionOutput, Prompt, Request, RequestOutput
from modelport.sampling_params import SamplingParams

Message = Mapping[str, Any]


def engine_config(model: str, settings: Mapping[str, Any]) -> EngineConfig:
    """:raises ValueError: an unknown setting (with its near misses) or a value that does not fit."""
    for name in settings:
        if name not in EngineConfig.model_fields:
            close = difflib.get_close_matches(name, EngineConfig.model_fields, n=1)
            raise ValueError(f"unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    try:
        return EngineConfig(model=model, **settings)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise ValueError(f"bad setting: {details}") from None


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
        self.config = about.config
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
        self.engine = Engine(about, self.plugins, settings, progress)
        self.engine.token_text = self.tokenizer.token if self.tokenizer is not None else None
        self._reader = PromptReader(self.tokenizer, self.config, self._generation, self.engine.max_model_len)
        self._random = random.Random(settings.seed)
        self._ids = itertools.count()

    def default_params(self) -> SamplingParams:
        """vLLM's defaults, with what the checkpoint's `generation_config.json` recommends."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        found = {name: self._generation[name] for name in names if self._generation.get(name) is not None}
        if self._generation.get("do_sample") is False:
            found = {k: v for k, v in found.items() if k == "repetition_penalty"}
        return SamplingParams(**found)

    def job(self, prompt: Prompt, params: SamplingParams | None, request_id: str | None = None) -> Job:
        """Check a prompt and its parameters, and make requests of them; nothing runs yet.

        :raises ValueError: empty, too long, token ids outside the vocabulary, parameters that do not fit.
        :raises TypeError: a prompt or parameters of another type.
        """
        params = self.default_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, not {type(params).__name__}: {params!r}")
        encoder_text, encoder_ids = None, None
        if self.engine.has_encoder:
            (encoder_text, encoder_ids), (text, ids) = self._reader.read_pair(prompt)
        else:
            text, ids = self._reader.read(prompt)
        params.validate_vocab(self.config.vocab_size)
        if params.logits_processors and self.engine.is_remote:
            raise ValueError(
                "logits_processors are functions, which worker processes are not sent; leave them out, or use "
                'distributed_executor_backend="inproc"'
            )
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise ValueError("stop strings and bad_words need a tokenizer; use stop_token_ids, or load one")
        request_id = str(next(self._ids)) if request_id is None else request_id
        job = Job(request_id, text, ids, params, encoder_text, encoder_ids)
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
                )
            )
        return job

    def chat_prompt(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Prompt:
        """Token ids of a conversation, by the model's chat template (which writes its own special tokens).

        :raises ValueError: no tokenizer, no template, or messages that the template refuses.
        """
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer; do not set skip_tokenizer_init")
        text = self.tokenizer.apply_chat_template(messages, **options)
        return {"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}

    def _encode_word(self, word: str) -> list[int]:
        return self.tokenizer.encode(word, add_special_tokens=False)

    def _eos_ids(self) -> tuple[int, ...]:
        found: dict[int, None] = {}
        own = self.tokenizer.eos_token_id if self.tokenizer is not None else None
        for ids in (own, self.config.eos_token_id, self._generation.get("eos_token_id")):
            for token in ids if isinstance(ids, list) else [ids]:
                if token is not None:
                    found[token] = None
        return tuple(found)


def _generation_config(path) -> dict[str, Any]:
    file = path / "generation_config.json" if path.is_dir() else None
    if file is None or not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    return found if isinstance(found, dict) else {}
