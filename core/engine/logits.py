"""What requests ask to have done to their logits before a token is chosen: masks, biases, penalties, own functions.

Decisions: an edit touches a few token ids of a row, so a step gathers the ids of all rows into one flat index and pays
for what is edited, not for rows times vocabulary. A request's past is counted once, when its tokens arrive.
Legend: x: (rows, vocab) float32, contiguous; a pair is (row of x, token ids).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modelport.engine.transfer import to_device
from modelport.sampling_params import SamplingParams, takes_prompt

Pairs = list[tuple[int, np.ndarray]]


class LogitsEdits:
    """The edits of every request in the batch, by slot."""

    def __init__(self, vocab_size: int, max_num_seqs: int):
        self.vocab_size = vocab_size
        self.active = np.zeros(max_num_seqs, dtype=bool)
        """(slots,) which rows have to go through `apply`."""
        self.looks_back = np.zeros(max_num_seqs, dtype=bool)
        """(slots,) which of them depend on the tokens before, beyond how many there are."""
        self._edits: list[_Edit | None] = [None] * max_num_seqs

    def add(
        self,
        slot: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: list[int],
        stop_ids: Sequence[int],
        bad_words_ids: Sequence[Sequence[int]],
        forced_token_ids: Mapping[int, int],
    ) -> None:
        """Take in a request; see `Sampler.add`. `stop_ids` are not chosen before `min_tokens`."""
        self.remove(slot)
        # An id beyond the row is one of the next row. The user's were checked; a tokenizer may know more than a model.
        assert max([*(params.logit_bias or ()), *(params.allowed_token_ids or ())], default=0) < self.vocab_size
        stop_ids = [token for token in stop_ids if 0 <= token < self.vocab_size]
        bad_words_ids = [word for word in bad_words_ids if max(word) < self.vocab_size]
        penalties = None
        if (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0):
            # Only the repetition penalty looks at the prompt, which may hold ids that stand for media.
            known = prompt_token_ids if params.repetition_penalty != 1 else ()
            penalties = _Seen(token for token in known if 0 <= token < self.vocab_size)
        processors = [(function, takes_prompt(function)) for function in params.logits_processors or ()]
        edit = _Edit(
            params=params,
            output=output_token_ids,
            prompt=list(prompt_token_ids) if any(wants for _, wants in processors) else [],
            allowed=None if params.allowed_token_ids is None else _unique(params.allowed_token_ids),
            bias_ids=np.array(list(params.logit_bias or ()), dtype=np.int64),
            bias=np.array(list((params.logit_bias or {}).values()), dtype=np.float32),
            stop_ids=_unique(stop_ids),
            bad_words=_by_prefix(bad_words_ids),
            processors=processors,
            seen=penalties,
            forced=forced_token_ids,
        )
        self._edits[slot] = edit
        self.active[slot] = edit.is_active(len(output_token_ids))
        self.looks_back[slot] = bool(edit.bad_words or edit.processors or edit.seen is not None)

    def remove(self, slot: int) -> None:
        """Forget the request in `slot`, if there is one."""
        self._edits[slot] = None
        self.active[slot] = self.looks_back[slot] = False

    def apply(self, x: Tensor, slots: np.ndarray, ahead: np.ndarray | None = None) -> dict[int, str]:
        """Edit `x` in place.

        :param slots: (rows,) int.
        :param ahead: (rows,) bool: whose output has one token more than its list; such rows must not look back.
        :return: rows whose own logits processor failed, and how.
        """
        assert x.is_contiguous()
        assert x.dtype == torch.float32
        rows = np.flatnonzero(self.active[slots]).tolist()
        edits = [(row, self._edits[slots[row]]) for row in rows]
        lengths = {row: len(e.output) + (ahead is not None and int(ahead[row])) for row, e in edits}
        self._allow(x, [(row, e.allowed) for row, e in edits if e.allowed is not None])
        self._ban(x, [(row, e.stop_ids) for row, e in edits if e.holds_stop(lengths[row])])
        self._bias(x, [(row, e) for row, e in edits if len(e.bias)])
        self._ban(x, [(row, ids) for row, e in edits if e.bad_words for ids in e.bad_next()])
        errors = {row: error for row, e in edits if (error := _process(x, row, e)) is not None}
        self._penalise(x, [(row, e) for row, e in edits if e.seen is not None])
        for row, edit in edits:
            if (forced := edit.forced.get(lengths[row])) is not None:  # whatever else was asked for
                x[row] = -torch.inf
                x[row, forced] = 0.0
            self.active[slots[row]] = edit.is_active(lengths[row])  # past `min_tokens` a row takes the fast path
        return errors

    def _allow(self, x: Tensor, pairs: Pairs) -> None:
        if pairs:
            index, flat = self._index(pairs, x.device), x.view(-1)
            kept = flat[index]
            x[to_device(np.array([row for row, _ in pairs]), x.device)] = -torch.inf
            flat[index] = kept

    def _ban(self, x: Tensor, pairs: Pairs) -> None:
        if pairs:
            x.view(-1)[self._index(pairs, x.device)] = -torch.inf

    def _bias(self, x: Tensor, edits: list[tuple[int, _Edit]]) -> None:
        if edits:
            bias = to_device(np.concatenate([edit.bias for _, edit in edits]), x.device)
            x.view(-1)[self._index([(row, edit.bias_ids) for row, edit in edits], x.device)] += bias

    def _penalise(self, x: Tensor, edits: list[tuple[int, _Edit]]) -> None:
        pairs, counts, settings = [], [], []
        for row, edit in edits:
            edit.seen.take(edit.output)
            if len(edit.seen.ids):
                pairs.append((row, np.frombuffer(edit.seen.ids, dtype=np.int64)))
                counts.append(np.frombuffer(edit.seen.counts, dtype=np.int32))
                p = edit.params
                settings.append((p.repetition_penalty, p.frequency_penalty, p.presence_penalty))
        if not pairs:
            return
        index, flat = self._index(pairs, x.device), x.view(-1)
        settings = np.repeat(np.array(settings, dtype=np.float32), [len(ids) for _, ids in pairs], axis=0)
        repetition, frequency, presence = to_device(settings.T.copy(), x.device)
        count = to_device(np.concatenate(counts).astype(np.float32), x.device)
        old = flat[index]
        new = torch.where(old > 0, old / repetition, old * repetition)
        flat[index] = new - frequency * count - presence * (count > 0)

    def _index(self, pairs: Pairs, device: torch.device) -> Tensor:
        """Where the pairs lie in x.view(-1)."""
        starts = np.repeat([row * self.vocab_size for row, _ in pairs], [len(ids) for _, ids in pairs])
        return to_device(np.concatenate([ids for _, ids in pairs]) + starts, device)


@dataclass(eq=False)
class _Edit:
    """One request's edits; `output` is the engine's own list, which grows."""

    params: SamplingParams
    output: list[int]
    prompt: list[int]
    allowed: np.ndarray | None
    bias_ids: np.ndarray
    bias: np.ndarray
    stop_ids: np.ndarray
    bad_words: dict[int, dict[tuple[int, ...], np.ndarray]]
    processors: list[tuple[Callable[..., Tensor], bool]]
    seen: _Seen | None
    forced: Mapping[int, int]

    def is_active(self, length: int) -> bool:
        """Whether there is anything to do when the output has `length` tokens."""
        return bool(
            self.allowed is not None
            or len(self.bias)
            or self.bad_words
            or self.processors
            or self.seen is not None
            or length <= max(self.forced, default=-1)
            or self.holds_stop(length)
        )

    def holds_stop(self, length: int) -> bool:
        return length < self.params.min_tokens and len(self.stop_ids) > 0

    def bad_next(self) -> list[np.ndarray]:
        """Tokens that would complete a bad word now."""
        found = []
        for length, endings in self.bad_words.items():
            if length <= len(self.output):
                found.append(endings.get(tuple(self.output[len(self.output) - length :])))
        return [ids for ids in found if ids is not None]


class _Seen:
    """The tokens of a request, each once, and how often the output has them (0: only the prompt does)."""

    def __init__(self, prompt_token_ids: Sequence[int]):
        self.ids = array("q", dict.fromkeys(prompt_token_ids))
        self.counts = array("i", bytes(4 * len(self.ids)))
        self._where = {token: i for i, token in enumerate(self.ids)}
        self._taken = 0

    def take(self, output: list[int]) -> None:
        """Count what has been added to `output` since the last call."""
        for token in output[self._taken :]:
            if (i := self._where.setdefault(token, len(self.ids))) == len(self.ids):
                self.ids.append(token)
                self.counts.append(0)
            self.counts[i] += 1
        self._taken = len(output)


def _process(x: Tensor, row: int, edit: _Edit) -> str | None:
    """Run a request's own functions over its row; a failure is that request's alone."""
    for function, wants_prompt in edit.processors:
        try:
            arguments = (edit.prompt, edit.output) if wants_prompt else (edit.output,)
            result = function(*arguments, x[row])
            if not isinstance(result, Tensor) or result.shape != x[row].shape:
                got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ValueError(f"it returned {got}, not a tensor of shape {tuple(x[row].shape)}")
            x[row] = result
        except Exception as error:  # a stranger's code: whatever it raises must not stop the other requests
            name = getattr(function, "__qualname__", type(function).__name__)
            return f"logits processor {name!r} failed: {type(error).__name__}: {error}"
    return None


def _unique(ids: Sequence[int]) -> np.ndarray:
    return np.unique(np.asarray(ids, dtype=np.int64))


def _by_prefix(words: Sequence[Sequence[int]]) -> dict[int, dict[tuple[int, ...], np.ndarray]]:
    """Length of a word's beginning -> the beginning -> the tokens that complete it."""
    grouped: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for *prefix, last in words:
        grouped.setdefault(len(prefix), {}).setdefault(tuple(prefix), []).append(last)
    return {n: {prefix: _unique(last) for prefix, last in group.items()} for n, group in grouped.items()}
