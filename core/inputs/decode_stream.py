"""Token ids in, text out, piece by piece, such that the pieces join to what decoding the whole gives.

Decisions: a piece is given out once no later token can change it; what is held back until then comes with `flush`.
Only the tokens since the last but one piece are decoded again at each step, so that a step costs the same however
long the text is. The stream of the `tokenizers` library works alike, but raises when bytes turn out to be no valid
UTF-8, and cannot hand out its rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelport.inputs.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to
_CLEAN_UP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)
_CLEAN_UP_ALPHABET = frozenset("".join(spaced for spaced, _ in _CLEAN_UP))


class DecodeStream:
    """Token ids in, text out, piece by piece.

    `"".join(steps) + flush()` equals `decode` of all ids. The one exception: in vocabularies with byte fallback a
    run of byte tokens that turns out to be no valid UTF-8 decodes to U+FFFD throughout, and what was given out before
    cannot be taken back. To wait for the end of every run would delay each line break, and the stop strings in it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # the tokens of the last piece, as context, and those since
        self._context = 0  # how many of them are context
        self._given = ""  # what the context decodes to
        self._unclean = ""  # decoded, but space clean-up may still change it

    def step(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain, often "" inside a character."""
        tokenizer = self._tokenizer
        if self._skip and token_id in tokenizer.special_ids:
            return ""  # it decodes to nothing, and is no context either
        self._ids.append(token_id)
        text = tokenizer._decode(self._ids, self._skip)
        if len(text) <= len(self._given) or text.endswith(_REPLACEMENT):
            return ""
        new = text[len(self._given) :]
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        self._given = tokenizer._decode(self._ids, self._skip)
        return self._settled(new)

    def flush(self) -> str:
        """Return what is held back (half a character as U+FFFD); call it once, after the last token."""
        rest = self._tokenizer._decode(self._ids, self._skip)[len(self._given) :]
        self._context, self._given = len(self._ids), self._given + rest
        unclean, self._unclean = self._unclean + rest, ""
        return clean_up(unclean) if self._tokenizer._clean_up else unclean

    def _settled(self, new: str) -> str:
        if not self._tokenizer._clean_up:
            return new
        text = self._unclean + new
        # a clean-up rule never reaches across a character that occurs in none of them
        end = max((i + 1 for i, char in enumerate(text) if char not in _CLEAN_UP_ALPHABET), default=0)
        self._unclean = text[end:]
        return clean_up(text[:end])


def clean_up(text: str) -> str:
    """Take the space out before punctuation and English endings, as transformers does for WordPiece."""
    for spaced, closed in _CLEAN_UP:
        text = text.replace(spaced, closed)
    return text
