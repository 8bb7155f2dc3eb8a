"""From logits to tokens: one row per running request.

Decisions: a token is a pure function of its request's logits, seed and place in the output, so neither the rest of the
batch nor a preemption changes it: the random number is a hash of (seed, place), and there is no generator to keep.
Rows are worked on together, in as few passes as their requests need: greedy ones take a single one.
Legend: logits, x: (rows, vocab); slot: a request's row in the engine's tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from modelport.engine.logits import LogitsEdits
from modelport.engine.transfer import Arrival, to_device
from modelport.kernels.argmax import argmax
from modelport.kernels.draw import draw, uniform
from modelport.kernels.logprobs import logprobs
from modelport.sampling_params import SamplingParams

SCORED_ROWS = 128  # prompt rows scored at a time, which bounds the float32 copies


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one place, from the untouched logits in float32.

    :ivar logprob: of the token that stands there.
    :ivar rank: of that token; 1 is the most likely.
    :ivar top_ids: the most likely tokens, best first.
    :ivar top_logprobs: theirs.
    """

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True)
class SamplerOutput:
    """One step's tokens.

    :ivar token_ids: (rows,) int64; -1 in rows with an error.
    :ivar logprobs: per row, None where they were not asked for.
    :ivar errors: rows that no token can be drawn from, with the reason; the other rows are sound.
    """

    token_ids: np.ndarray
    logprobs: list[TokenLogprobs | None]
    errors: dict[int, str]


@dataclass(frozen=True)
class Choice:
    """One step's tokens, which the device may still be choosing.

    :ivar tokens: (rows,) int64, on the device; some token in rows with an error.
    :ivar slots: (rows,) int.
    :ivar errors: rows that are known to have one.
    :ivar scored: rows whose log-probabilities were asked for.
    :ivar arrival: of the tokens, the greatest logits, and the columns of `TokenLogprobs` of the rows that are scored.
    """

    tokens: Tensor
    slots: np.ndarray
    errors: dict[int, str]
    scored: np.ndarray
    arrival: Arrival


class Sampler:
    """Chooses tokens for up to `max_num_seqs` requests, each in its slot.

    :param vocab_size: columns of the logits.
    :param device: where the logits will lie.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device):
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self._edits = LogitsEdits(vocab_size, max_num_seqs)
        # (slots,) each: what a step reads is picked by slot, without a look at a request.
        self._temperature = np.zeros(max_num_seqs, dtype=np.float32)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int64)  # 0: all
        self._top_p = np.ones(max_num_seqs)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self._seed = np.zeros(max_num_seqs, dtype=np.uint64)
        self._logprobs = np.full(max_num_seqs, -1)  # -1: none
        self._outputs: list[list[int]] = [[] for _ in range(max_num_seqs)]

    def add(
        self,
        slot: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: list[int],
        seed: int,
        eos_token_ids: tuple[int, ...],
        bad_words_ids: Sequence[Sequence[int]] = (),
        forced_token_ids: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """Put a request into a slot; one that was there before is forgotten.

        :param output_token_ids: the engine's own list: it appends every token; not empty after a preemption.
        :param seed: any integer; with the length of `output_token_ids` it determines the next random number.
        :param eos_token_ids: tokens that end a text; not chosen before `params.min_tokens`.
        :param bad_words_ids: token sequences that must not come about (`SamplingParams.bad_words_token_ids`).
        :param forced_token_ids: place in the output -> the only token that may stand there.
        """
        stop_ids = (*eos_token_ids, *(params.stop_token_ids or ()))
        self._edits.add(slot, params, prompt_token_ids, output_token_ids, stop_ids, bad_words_ids, forced_token_ids)
        self._outputs[slot] = output_token_ids
        self._temperature[slot] = min(params.temperature, 1e30)  # more is infinite in float32
        self._top_k[slot] = params.top_k if 0 < params.top_k < self.vocab_size else 0
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = seed & (2**64 - 1)
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs

    def remove(self, slot: int) -> None:
        """Empty a slot."""
        self._edits.remove(slot)
        self._outputs[slot] = []

    def looks_back(self, slots: np.ndarray) -> bool:
        """Whether the host has to know the tokens before a choice for one of these slots."""
        return bool(self._edits.looks_back[slots].any())

    def sample(self, logits: Tensor, slots: np.ndarray) -> SamplerOutput:
        """Choose the next token of each row.

        :param logits: (rows, vocab) of any floating type; left as they are.
        :param slots: (rows,) int: whose row it is.
        """
        return self.read(self.choose(logits, slots))

    @torch.inference_mode()
    def choose(self, logits: Tensor, slots: np.ndarray, ahead: np.ndarray | None = None) -> Choice:
        """As `sample`, without waiting for the device.

        :param ahead: (rows,) bool: whose last token is chosen, but not in the list of outputs yet.
        """
        assert logits.shape == (len(slots), self.vocab_size), (logits.shape, len(slots), self.vocab_size)
        assert ahead is None or not self.looks_back(slots[ahead]), "edits depend on tokens that nobody knows yet"
        x, errors = logits, {}
        if self._edits.active[slots].any():
            x = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).copy_(logits)
            errors = self._edits.apply(x, slots, ahead)
        tokens, best = argmax(x)
        rows = np.flatnonzero(self._temperature[slots] > 0)
        if len(rows):
            where, mine = self._tensor(rows), slots[rows]
            places = np.fromiter((len(self._outputs[slot]) for slot in mine), np.uint64, len(rows))
            if ahead is not None:
                places += ahead[rows]
            settings = (self._temperature[mine], self._top_k[mine], self._top_p[mine], self._min_p[mine])
            numbers = map(self._tensor, (*settings, uniform(self._seed[mine], places)))
            whole = len(rows) == len(slots)
            tokens[where] = draw(x if whole else x[where], best if whole else best[where], *numbers)
        rows, scores = np.flatnonzero(self._logprobs[slots] >= 0), ()
        if len(rows):
            where = self._tensor(rows)
            k, whole = int(self._logprobs[slots[rows]].max()), len(rows) == len(slots)
            scores = logprobs(*((logits, tokens) if whole else (logits[where], tokens[where])), k)
        return Choice(tokens, slots, errors, rows, Arrival(tokens, best, *scores))

    def read(self, choice: Choice) -> SamplerOutput:
        """Wait for a choice."""
        tokens, best, *scores = choice.arrival.arrays()
        tokens, errors = tokens.copy(), dict(choice.errors)  # on a CPU they are the choice's own
        found: list[TokenLogprobs | None] = [None] * len(tokens)
        for row, entry in zip(choice.scored.tolist(), _entries(scores), strict=True):
            k = int(self._logprobs[choice.slots[row]])
            found[row] = TokenLogprobs(entry.logprob, entry.rank, entry.top_ids[:k], entry.top_logprobs[:k])
        for row in np.flatnonzero(~np.isfinite(best)).tolist():
            errors.setdefault(row, _why_not(best[row], choice.slots[row]))
        for row in errors:
            tokens[row], found[row] = -1, None
        return SamplerOutput(tokens, found, errors)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)


@torch.inference_mode()
def prompt_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> list[TokenLogprobs]:
    """Log-probabilities of the tokens that follow each row.

    :param logits: (rows, vocab) of any floating type.
    :param token_ids: (rows,) int64, on the same device.
    :param k: most likely tokens to name beside the one that follows.
    """
    parts = zip(logits.split(SCORED_ROWS), token_ids.split(SCORED_ROWS), strict=True)
    arrivals = [Arrival(*logprobs(some, tokens, k)) for some, tokens in parts]
    return [entry for arrival in arrivals for entry in _entries(arrival.arrays())]


def _entries(columns: Sequence[np.ndarray]) -> list[TokenLogprobs]:
    return [TokenLogprobs(*entry) for entry in zip(*(column.tolist() for column in columns), strict=True)]


def _why_not(best: float, slot: int) -> str:
    if best == -np.inf:
        return (
            "every token is ruled out: allowed_token_ids, bad_words, min_tokens, logit_bias and logits_processors "
            "leave nothing to choose from"
        )
    return f"FloatingPointError: the logits of slot {slot} hold {best}; are the model's weights and its dtype right?"
