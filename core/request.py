"""One request on its way through the engine, and what its caller gets back (named as vLLM names it)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from modelport.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np

    from modelport.engine.detokenizer import Detokenizer
    from modelport.inputs.processor import PlacedItem
    from modelport.modeling.adapters import Adapter


@dataclass(frozen=True)
class LoRARequest:
    """An adapter to use, named as in vLLM.

    :ivar lora_name: what people call it.
    :ivar lora_int_id: what tells it from others in this engine; above 0.
    :ivar lora_path: a folder, or a name that a source of models knows.
    :raises ValueError: an empty name or path, or an id below 1.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        if not self.lora_name or not self.lora_path:
            raise ValueError(f"a LoRARequest needs a name and a path, got {self.lora_name!r} and {self.lora_path!r}")
        if not isinstance(self.lora_int_id, int) or self.lora_int_id < 1:
            raise ValueError(f"lora_int_id={self.lora_int_id!r} must be an integer above 0")


class Logprob(NamedTuple):
    """Log-probability of a token, its rank (1 = most likely), and its text."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass
class RequestMetrics:
    """Times are seconds of `time.monotonic`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass
class CompletionOutput:
    """One completion of a prompt.

    :ivar finish_reason: "stop" (end of text, stop token, stop string), "length", "abort", "error"; None while running.
    :ivar stop_reason: the stop string or stop token id that ended it; None at the end of text. The message of an error.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt with its completions; while streaming, what there is of them so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    lora_request: LoRARequest | None = None


@dataclass(frozen=True)
class View:
    """Neighbours among the media that cross attention reads; tokens see those of them that are not behind.

    :ivar end: the first token that sees them no more.
    """

    placed: tuple[PlacedItem, ...]
    end: int

    @property
    def start(self) -> int:
        return self.placed[0].start

    @property
    def num_keys(self) -> int:
        return sum(placed.item.num_keys for placed in self.placed)


def views(media: Sequence[PlacedItem]) -> tuple[View, ...]:
    """What cross attention reads of a prompt's media, in order."""
    groups: list[list[PlacedItem]] = []
    for placed in media:
        if not placed.item.num_keys:
            continue
        if groups and groups[-1][-1].end == placed.start:
            groups[-1].append(placed)
        else:
            groups.append([placed])
    ends = [*(group[0].start for group in groups[1:]), 1 << 62]
    return tuple(View(tuple(group), end) for group, end in zip(groups, ends, strict=True)) if groups else ()


@dataclass(eq=False)
class Request:
    """One sequence in the engine; a prompt with `n=3` is three of them.

    :ivar text: what its caller has been told of the output's text.
    :ivar num_computed: tokens whose keys and values lie in the cache.
    :ivar forced_token_ids: place in the output -> the only token that may stand there.
    :ivar length_class: which rotary angles its keys have (`Rope.length_class`).
    :ivar encoder_token_ids: of encoder-decoder models: what the encoder reads; empty otherwise.
    :ivar media: images, videos and sounds in the prompt, in order.
    :ivar spans: (start, end) of tokens that see each other, later ones too; they are computed in one step.
    :ivar marks: (start, end, digest): tokens whose keys depend on more than the ids before them, and on what.
    :ivar axes: (axes, prompt tokens) int32 rotary positions of the prompt, for models that have several; None where
        they are the tokens' places.
    :ivar adapter: what it is computed with, besides the model.
    :ivar adapter_slot: where that lies while the request runs; -1 for none.
    :ivar blocks: cache blocks in order, for each group of layers; empty while it has none.
    :ivar block_hashes: hash chain over the full blocks of `token_ids`, as far as it has been needed.
    :ivar num_published: blocks, from the first on, that the cache knows by their hash.
    :ivar slot: row in the runner's tables, -1 while it has none.
    :ivar leader: the request with the same prompt whose cache this one waits to share (`n > 1`).
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]
    max_total_tokens: int
    detokenizer: Detokenizer | None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    index: int = 0
    leader: Request | None = None
    text: str = ""
    num_computed: int = 0
    length_class: int = 0
    forced_token_ids: dict[int, int] = field(default_factory=dict)
    encoder_token_ids: list[int] = field(default_factory=list)
    media: tuple[PlacedItem, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    marks: tuple[tuple[int, int, bytes], ...] = ()
    axes: np.ndarray | None = None
    adapter: Adapter | None = None
    adapter_slot: int = -1
    blocks: list[list[int]] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    slot: int = -1
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.monotonic()))

    @cached_property
    def views(self) -> tuple[View, ...]:
        """What cross attention reads of its media."""
        return views(self.media)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the next step still has prompt rows to score; a preempted request was scored before."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens


Prompt = str | Sequence[int] | dict[str, Any]
"""Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`, with `"multi_modal_data": {"image": ...}` beside
it for a model that takes media (docs/multimodal.md); for an encoder-decoder model also
`{"encoder_prompt": ..., "decoder_prompt": ...}`, each in one of these forms."""
