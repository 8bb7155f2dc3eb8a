"""The prompts of a conformance run: around the edges of blocks, chunks and windows, some with a beginning in common."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

TOKENS = 32
"""Tokens that every prompt is continued by."""
LENGTHS = (1, 15, 16, 17, 61)
SHARED = 40  # tokens that the longest prompt and another one begin with
ENCODER_LENGTHS = (17, 1, 40, 16)  # in turn


@dataclass(frozen=True)
class Prompt:
    """What a model is given.

    :ivar token_ids: what is continued; in an encoder-decoder model by the decoder.
    :ivar encoder_token_ids: what the encoder reads; None in a model that has none.
    """

    token_ids: tuple[int, ...]
    encoder_token_ids: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def for_engine(self) -> dict[str, Any]:
        """As `LLM.generate` takes it."""
        given = {"prompt_token_ids": list(self.token_ids)}
        if self.encoder_token_ids is None:
            return given
        return {"encoder_prompt": {"prompt_token_ids": list(self.encoder_token_ids)}, "decoder_prompt": given}


def make_prompts(
    vocab_size: int,
    windows: Iterable[int],
    longest: int,
    has_encoder: bool = False,
    start: int | None = None,
    without: Collection[int] = (),
) -> list[Prompt]:
    """Prompts of up to `longest` tokens: the usual lengths, those around each window's edge, and a shared beginning.

    :param windows: sizes of the model's sliding windows.
    :param has_encoder: give the encoder something to read as well.
    :param start: the token that every decoder prompt of an encoder-decoder model begins with.
    :param without: tokens that no prompt holds, such as those that stand for media.
    """
    lengths = dict.fromkeys(LENGTHS)
    for window in windows:
        lengths |= dict.fromkeys((window - 1, window, window + 1, 2 * window + 3))
    source = random.Random(7)

    def tokens(length: int) -> tuple[int, ...]:
        # 0 is left out: padding in many vocabularies, and some embeddings treat it apart
        drawn = (source.randrange(1, vocab_size) for _ in count())
        return tuple(islice((token for token in drawn if token not in without), length))

    made = [tokens(length) for length in lengths if 1 <= length <= longest]
    stem = max(made, key=len)
    if len(stem) > SHARED:
        made.append(stem[:SHARED] + made[1])
    made = [ids for ids in made if len(ids) <= longest]
    if not has_encoder:
        return [Prompt(ids) for ids in made]
    beginning = () if start is None else (start,)
    reads = [tokens(min(ENCODER_LENGTHS[i % len(ENCODER_LENGTHS)], longest)) for i in range(len(made))]
    return [Prompt((beginning + ids)[: len(ids)], read) for ids, read in zip(made, reads, strict=True)]
