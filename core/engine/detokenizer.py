"""From tokens to text, one token at a time, and the stop strings in it.

Decisions: the stop string that is complete first ends the text, so that how tokens cut the text does not matter (of
several complete at once, the longest). Matching is by Knuth, Morris and Pratt: each new character is looked at once,
and how far each stop string has got says how much of the text a stream must hold back, and no more than that.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

from modelport.sampling_params import SamplingParams


class TokenStream(Protocol):
    def step(self, token_id: int) -> str:
        """The text that this token completes; "" while it is only part of a character."""
        ...

    def flush(self) -> str:
        """What is left when no token follows: the text of a character that was cut off."""
        ...


class Decoder(Protocol):
    """What a tokenizer has to be able to do here."""

    def decode_stream(self, skip_special_tokens: bool = True) -> TokenStream: ...


class Detokenizer:
    """The text of one output. A step costs time for its new text, not for what there is already.

    :param tokenizer: None when the engine has none; there is no text then.
    :raises ValueError: there are stop strings, and no tokenizer.
    """

    def __init__(self, tokenizer: Decoder | None, params: SamplingParams):
        stops = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
        if tokenizer is None and stops:
            raise ValueError(f"stop={stops!r}: the engine has no tokenizer to look for text with; use stop_token_ids")
        has_text = tokenizer is not None and params.detokenize
        self._stream = tokenizer.decode_stream(params.skip_special_tokens) if has_text else None
        # Longest first: of those that end at the same character it is found first.
        self._matches = [_Match(stop) for stop in sorted(dict.fromkeys(stops), key=len, reverse=True)]
        self._keeps_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._parts: list[str] = []  # joined they are the text
        self._streamed = 0  # parts that `delta` has seen
        self._held = ""  # what it saw and did not give out
        self._finished = False

    @property
    def text(self) -> str:
        """All text so far; it ends before the stop string, or after it if the request wants to see it."""
        return "".join(self._parts)

    def append(self, token_id: int) -> str | None:
        """Take in the next token.

        :return: the stop string that this token completes, if any; nothing may be appended after that.
        """
        assert not self._finished
        self._num_tokens += 1
        return None if self._stream is None else self._take(self._stream.step(token_id))

    def delta(self) -> str:
        """Text since the last call that no stop string can take back; all of it once the output is finished."""
        fresh = self._held + "".join(self._parts[self._streamed :])
        self._streamed = len(self._parts)
        doubtful = 0 if self._finished or self._keeps_stop else max((m.length for m in self._matches), default=0)
        safe = len(fresh) - doubtful
        self._held = fresh[safe:]
        return fresh[:safe]

    def finish(self) -> None:
        """No token follows: the next `delta` gives out what was held back."""
        if not self._finished and self._stream is not None:
            self._take(self._stream.flush())
        self._finished = True

    def _take(self, new: str) -> str | None:
        """Add `new` to the text; the stop string that it completes, if any."""
        if new:
            self._parts.append(new)
        for place, character in enumerate(new, start=1):
            for match in self._matches:
                if match.step(character) and self._num_tokens > self._min_tokens:
                    self._end_before(len(new) - place + (0 if self._keeps_stop else len(match.stop)))
                    return match.stop
        return None

    def _end_before(self, surplus: int) -> None:
        """Take the last `surplus` characters off the text; `delta` has not given them out."""
        fresh = self._held + "".join(self._parts[self._streamed :])
        assert surplus <= len(fresh)
        text = self.text
        self._parts = [text[: len(text) - surplus]]
        self._held, self._streamed = fresh[: len(fresh) - surplus], 1
        self._finished = True


class _Match:
    """How far a stop string has got: the text ends with its first `length` characters, and with no more of it."""

    def __init__(self, stop: str):
        self.stop, self.length, self._borders = stop, 0, _borders(stop)

    def step(self, character: str) -> bool:
        """Whether the stop string is complete with this character."""
        while self.length and self.stop[self.length] != character:
            self.length = self._borders[self.length - 1]
        self.length += self.stop[self.length] == character
        if self.length < len(self.stop):
            return False
        self.length = self._borders[-1]  # ready for a match that begins inside this one, should this one not count
        return True


@lru_cache(maxsize=256)
def _borders(stop: str) -> tuple[int, ...]:
    """For each beginning of `stop`: how many of its last characters are also its first ones (fewer than all)."""
    borders = [0]
    for character in stop[1:]:
        length = borders[-1]
        while length and stop[length] != character:
            length = borders[length - 1]
        borders.append(length + (stop[length] == character))
    return tuple(borders)
