"""`SamplingParams`: how one request wants its tokens chosen, when it stops, and what it wants to see.

Decisions: vLLM's names, defaults and limits; every bad value is a `ValueError` with field, value and cure, raised when
the object is made and again when the engine takes it (fields may be assigned in between). Nothing here imports torch.
"""

from __future__ import annotations

import inspect
import logging
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any

logger = logging.getLogger(__name__)

MIN_TEMPERATURE = 1e-2  # below it float32 weights of all but the best token underflow; 0 is greedy
MAX_LOGPROBS = 20
MAX_N = 16384


@dataclass(kw_only=True)
class SamplingParams:
    """What a request may set; keyword arguments only.

    :ivar n: outputs per prompt, 1 to 16384; greedy requests have only one.
    :ivar temperature: 0 is greedy; above 0 and below 0.01 becomes 0.01.
    :ivar top_p: draw from the smallest set of most likely tokens with this mass, in (0, 1].
    :ivar top_k: draw from this many most likely tokens (ties included); 0 or -1 means all.
    :ivar min_p: drop tokens less likely than this share of the most likely one, in [0, 1].
    :ivar repetition_penalty: divides (or multiplies, below zero) logits of tokens in prompt or output, above 0.
    :ivar presence_penalty: taken from logits of tokens in the output, in [-2, 2].
    :ivar frequency_penalty: the same, times how often the token occurs, in [-2, 2].
    :ivar seed: the same seed, prompt and parameters give the same output; None or -1: the engine's seed.
    :ivar stop: string or strings that end the output; a list once the object is made.
    :ivar stop_token_ids: tokens that end the output.
    :ivar min_tokens: no end before this many tokens.
    :ivar max_tokens: most tokens of an output; None: until the model's length is used up.
    :ivar ignore_eos: go on after the end-of-sequence token.
    :ivar logprobs: log-probabilities of this many most likely tokens beside the chosen one, 0 to 20.
    :ivar prompt_logprobs: the same for the prompt's tokens.
    :ivar logit_bias: added to logits, by token id (a number, or digits as JSON has them).
    :ivar bad_words: strings that the output must not spell.
    :ivar allowed_token_ids: nothing but these may be chosen.
    :ivar detokenize: False: outputs have token ids and no text.
    :ivar logits_processors: callables `(output_token_ids, logits) -> logits`, or with `prompt_token_ids` before
        them; `logits` is a (vocab,) float32 tensor and may be changed in place.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    logits_processors: list[Callable[..., Any]] | None = None

    def __post_init__(self) -> None:
        self.check()

    @property
    def greedy(self) -> bool:
        """Always the most likely token."""
        return self.temperature == 0

    def check(self) -> None:
        """Bring every field to its plain form (lists, ints, floats).

        :raises ValueError: the first field with a bad value, with the range it should be in.
        """
        self.n = _integer("n", self.n, 1, MAX_N)
        self.temperature = _number("temperature", self.temperature, "a finite number >= 0; 0 is greedy", low=0)
        if 0 < self.temperature < MIN_TEMPERATURE:
            _note_small_temperature()
            self.temperature = MIN_TEMPERATURE
        want = "a number in (0, 1]; 1 keeps all tokens, temperature=0 is greedy"
        self.top_p = _number("top_p", self.top_p, want, above=0, high=1)
        self.top_k = _integer("top_k", self.top_k, -1, hint="; 0 or -1 means all tokens")
        self.min_p = _number("min_p", self.min_p, "a number in [0, 1]; 0 keeps all tokens", low=0, high=1)
        want = "a finite number above 0; 1 is no penalty"
        self.repetition_penalty = _number("repetition_penalty", self.repetition_penalty, want, above=0)
        for name in ("presence_penalty", "frequency_penalty"):
            want = "a number in [-2, 2]; 0 is no penalty"
            setattr(self, name, _number(name, getattr(self, name), want, low=-2, high=2))
        if self.seed is not None:
            self.seed = _integer("seed", self.seed, -(2**63), 2**64 - 1, hint=", or None")
            self.seed = None if self.seed == -1 else self.seed
        self._check_length()
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, _integer(name, value, 0, MAX_LOGPROBS, hint=", or None"))
        self._check_tokens()
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "True or False")
        if self.stop and not self.detokenize:
            raise _bad("stop", self.stop, "None when detokenize=False, as there is no text; use stop_token_ids")
        if self.greedy and self.n > 1:
            raise _bad("n", self.n, "1 when temperature=0, as greedy outputs are all equal; set a temperature")

    def validate_vocab(self, vocab_size: int) -> None:
        """Check again, now knowing the model.

        :raises ValueError: a bad field, or a token id that the vocabulary does not have.
        """
        self.check()
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise ValueError(f"{name}: the model has no token id {token}; its ids are 0 to {vocab_size - 1}")

    def bad_words_token_ids(self, encode: Callable[[str], list[int]]) -> list[tuple[int, ...]]:
        """The token sequences that spell the bad words, each at the start of a line and after a space.

        :param encode: text to token ids, without special tokens.
        """
        spellings: dict[tuple[int, ...], None] = {}  # a set that keeps its order
        for word in self.bad_words or ():
            word = word.lstrip(" ") or word
            for text in (word, " " + word):
                if ids := encode(text):
                    spellings[tuple(ids)] = None
        return list(spellings)

    def _check_length(self) -> None:
        self.min_tokens = _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is None:
            return
        self.max_tokens = _integer("max_tokens", self.max_tokens, 1, hint="; None: up to the model's length")
        if self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")

    def _check_tokens(self) -> None:
        want = "a non-empty string, or a list of them"
        self.stop = _strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop, want)
        self.bad_words = _strings("bad_words", self.bad_words, "a list of non-empty strings")
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise _bad("allowed_token_ids", [], "at least one token id; None allows all")
        if self.logit_bias is not None:
            self.logit_bias = _logit_bias(self.logit_bias)
        processors = [] if self.logits_processors is None else self.logits_processors
        if not isinstance(processors, list | tuple):
            raise _bad("logits_processors", processors, "a list of callables")
        for processor in processors:
            takes_prompt(processor)
        self.logits_processors = list(processors)


def takes_prompt(processor: Callable[..., Any]) -> bool:
    """Whether a logits processor wants `(prompt_token_ids, output_token_ids, logits)` rather than the last two.

    :raises ValueError: it takes neither two nor three arguments.
    """
    want = "a callable (output_token_ids, logits) or (prompt_token_ids, output_token_ids, logits)"
    if not callable(processor):
        raise _bad("logits_processors", processor, want)
    try:
        signature = inspect.signature(processor)
    except (TypeError, ValueError):  # some built-in callables do not say what they take
        return False
    for arguments in (2, 3):  # a third that is optional is the function's own
        try:
            signature.bind(*[None] * arguments)
        except TypeError:
            continue
        return arguments == 3
    raise _bad("logits_processors", processor, want)


def _bad(field: str, value: object, want: str) -> ValueError:
    return ValueError(f"{field}={reprlib.repr(value)} is not valid: it must be {want}")


@cache
def _note_small_temperature() -> None:
    logger.warning("temperatures above 0 and below %s are raised to %s; use 0 for greedy", *[MIN_TEMPERATURE] * 2)


def _integer(field: str, value: object, low: int, high: int | None = None, hint: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low or (high is not None and value > high):
        span = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
        raise _bad(field, value, span + hint)
    return int(value)


def _number(
    field: str, value: object, want: str, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _bad(field, value, want)
    try:
        number = float(value)
    except OverflowError:  # an int that no float can hold
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or number <= above:
        raise _bad(field, value, want)
    return number


def _items(field: str, values: object, want: str) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise _bad(field, values, want)
    return list(values)


def _strings(field: str, values: object, want: str) -> list[str]:
    items = [] if values is None else _items(field, values, want)
    for item in items:
        if not isinstance(item, str) or not item:
            raise _bad(field, item, want)
    return items


def _token_ids(field: str, values: object) -> list[int]:
    want = "a list of token ids (integers >= 0)"
    ids = [] if values is None else _items(field, values, want)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral) or token < 0:
            raise _bad(field, token, want)
    return [int(token) for token in ids]


def _logit_bias(bias: object) -> dict[int, float]:
    want = "a dict from token ids (integers >= 0) to finite numbers"
    if not isinstance(bias, Mapping):
        raise _bad("logit_bias", bias, want)
    checked = {}
    for key, value in bias.items():
        try:
            token = _token_ids("logit_bias", [int(key) if isinstance(key, str) else key])[0]
            checked[token] = _number("logit_bias", value, want)
        except ValueError:
            raise _bad("logit_bias", {key: value}, want) from None
    return checked
