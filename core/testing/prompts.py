"""The prompts of a conformance run: around the edges of blocks, chunks and windows, some with a beginning in common."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TOKENS = 32
"""Tokens that every prompt is continued by."""
LENGTHS = (1, 15, 16, 17, 61)
SHARED = 40  # tokens that the longest prompt and another one begin with


@dataclass(frozen=True)
class Prompt:
    """What a model is given; a record, because further kinds of input will stand beside the tokens."""

    token_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    def for_engine(self) -> dict[str, Any]:
        """As `LLM.generate` takes it."""
        return {"prompt_token_ids": list(self.token_ids)}


def make_prompts(vocab_size: int, windows: Iterable[int], longest: int) -> list[Prompt]:
    """Prompts of up to `longest` tokens: the usual lengths, those around each window's edge, and a shared beginning.

    :param windows: sizes of the model's sliding windows.
    """
    lengths = dict.fromkeys(LENGTHS)
    for window in windows:
        lengths |= dict.fromkeys((window - 1, window, window + 1, 2 * window + 3))
    source = random.Random(7)
    # 0 is left out: padding in many vocabularies, and some embeddings treat it apart
    made = [
        tuple(source.randrange(1, vocab_size) for _ in range(length)) for length in lengths if 1 <= length <= longest
    ]
    stem = max(made, key=len)
    if len(stem) > SHARED:
        made.append(stem[:SHARED] + made[1])
    return [Prompt(token_ids) for token_ids in made if len(token_ids) <= longest]
