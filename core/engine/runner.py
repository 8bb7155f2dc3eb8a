"""One forward pass: from a plan to a `Batch`, through the model, to the next tokens.

Decisions: the runner keeps the tokens and blocks of running requests in tables, one row (slot) each, so that a step is
array arithmetic over the rows it uses and copies nothing that has not changed. It knows no queue and no text.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from modelport.batch import Batch, Encoded, Pages
from modelport.engine.cache import Group
from modelport.engine.recording import Recorder
from modelport.engine.sampler import Sampler, TokenLogprobs, prompt_logprobs
from modelport.engine.scheduler import Plan
from modelport.kernels import cpu
from modelport.modeling.decoder import Model, forward
from modelport.request import Request


@dataclass
class StepResult:
    """What a step found, by index into the plan's requests.

    :ivar token_ids: the sampled token, -1 where the request has not reached its end yet.
    :ivar errors: requests whose logits are of no use, with the reason.
    """

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class Runner:
    """Holds the model and the rows of running requests.

    :param num_slots: rows.
    :param max_model_len: columns: most tokens of one request.
    :param by_length: rotary angles depend on a sequence's length.
    :param groups: of the cache; each has a table of block numbers.
    :param states: of recurrent layers, (num_slots, *shape) each.
    """

    def __init__(
        self,
        model: Model,
        vocab_size: int,
        num_slots: int,
        max_model_len: int,
        block_size: int,
        groups: list[Group],
        states: list[Tensor],
        device: torch.device,
        by_length: bool = False,
    ):
        self.model, self.device, self.block_size = model, device, block_size
        self._forward = functools.partial(forward, model)  # a part of a model has another way
        self.sampler = Sampler(vocab_size, num_slots, device)
        recorded = device.type == "cpu" and cpu.lib is not None
        self.recorder = Recorder(self._decode, states) if recorded else None
        self.on_logits: Callable[[Tensor], None] | None = None  # sees every row of logits in order; for checks
        # Zeros are not touched until they are used: a large table costs memory only for the rows in use.
        self._token_ids = np.zeros((num_slots, max_model_len), dtype=np.int32)
        columns = -(-max_model_len // block_size)
        self._groups, self.by_length = groups, by_length
        self._blocks = [np.zeros((num_slots, columns), dtype=np.int32) for _ in groups]
        self._num_blocks = np.zeros((len(groups), num_slots), dtype=np.int32)
        self._encoder_lens = np.zeros(num_slots, dtype=np.int32)
        self._outputs: list[list[int]] = [[] for _ in range(num_slots)]

    @torch.inference_mode()
    def step(self, plan: Plan) -> StepResult:
        """Run the plan; keys and values are written, and a token is sampled for each request that reached its end."""
        for slot in plan.left:
            self.sampler.remove(slot)
        for request in plan.joined:
            self._join(request)
        slots, computed, lengths, counts = self._rows(plan)
        token_ids, batch = self._batch(plan, slots, computed, counts)
        result = StepResult([-1] * len(slots))
        done = np.flatnonzero(computed + counts == lengths)
        scored = {i: r for i, r in enumerate(plan.requests) if r.wants_prompt_logprobs}
        logits = None
        if self.recorder is not None and len(done) == len(token_ids) and not plan.joined and not scored:
            logits = self.recorder.run(token_ids, batch)
        if logits is None:
            state = self._forward(token_ids, batch)
            ends = np.cumsum(counts)
            for index, request in scored.items():
                result.prompt_logprobs[index] = self._score(request, state, ends[index] - counts[index], counts[index])
            logits = self._logits(state, self._tensor(ends[done] - 1)) if len(done) else None
        if logits is not None:
            if self.on_logits is not None:
                self.on_logits(logits)
            self._sample(result, logits, slots, lengths, done)
        return result

    def _decode(self, token_ids: Tensor, batch: Batch) -> Tensor:
        """Logits of every row."""
        return self.model.lm_head(self.model.finish(forward(self.model, token_ids, batch)))

    def _rows(self, plan: Plan) -> tuple[np.ndarray, ...]:
        """Of each request (seqs,) int32: slot, computed tokens, known tokens, tokens of this step."""
        slots = np.fromiter((r.slot for r in plan.requests), np.int32, len(plan.requests))
        computed = np.fromiter((r.num_computed for r in plan.requests), np.int32, len(plan.requests))
        lengths = np.fromiter((len(r.token_ids) for r in plan.requests), np.int32, len(plan.requests))
        for request in plan.requests:
            self._note_blocks(request)
        return slots, computed, lengths, np.asarray(plan.counts, dtype=np.int32)

    def _seat(self, request: Request) -> None:
        """Give a request its row in the tables."""
        slot = request.slot
        self._token_ids[slot, : len(request.token_ids)] = request.token_ids
        self._num_blocks[:, slot] = 0
        self._encoder_lens[slot] = len(request.encoder_token_ids)

    def _join(self, request: Request) -> None:
        self._seat(request)
        slot = request.slot
        self._outputs[slot] = request.output_token_ids
        self.sampler.add(
            slot,
            request.params,
            request.token_ids[: request.num_prompt_tokens],
            self._outputs[slot],
            request.seed,
            request.eos_token_ids,
            request.bad_words_ids,
            request.forced_token_ids,
        )

    def _note_blocks(self, request: Request) -> None:
        slot = request.slot
        for table, counts, blocks in zip(self._blocks, self._num_blocks, request.blocks, strict=True):
            known = counts[slot]
            if len(blocks) > known:
                table[slot, known : len(blocks)] = blocks[known:]
                counts[slot] = len(blocks)

    def _batch(self, plan: Plan, slots: np.ndarray, computed: np.ndarray, counts: np.ndarray) -> tuple[Tensor, Batch]:
        starts = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        seq_lens = computed + counts
        max_query_len = int(counts.max())
        if max_query_len == 1:
            rows, positions = slots, computed.astype(np.int64)
        else:
            rows = np.repeat(slots, counts)
            positions = np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[:-1] - computed, counts)
        crosses = any(group.cross for group in self._groups)
        batch = Batch(
            positions=self._tensor(positions),
            query_starts=self._tensor(starts),
            seq_lens=self._tensor(seq_lens),
            pages=tuple(
                self._cross_pages(table, plan, slots)
                if group.cross
                else self._pages(table, slots, int(seq_lens.max()), rows, positions)
                for group, table in zip(self._groups, self._blocks, strict=True)
            ),
            state_slots=self._tensor(slots),
            max_query_len=max_query_len,
            length_classes=self._length_classes(plan) if self.by_length else None,
            encoded=self._encode(plan, rows, slots) if crosses else None,
        )
        return self._tensor(self._token_ids[rows, positions].astype(np.int64)), batch

    def _length_classes(self, plan: Plan) -> Tensor:
        return self._tensor(np.fromiter((r.length_class for r in plan.requests), np.int32, len(plan.requests)))

    def _pages(
        self, table: np.ndarray, slots: np.ndarray, longest: int, rows: np.ndarray, positions: np.ndarray
    ) -> Pages:
        size = self.block_size
        where = table[rows, positions // size].astype(np.int64) * size + positions % size
        return Pages(self._tensor(table[slots, : -(-longest // size)]), self._tensor(where))

    def _cross_pages(self, table: np.ndarray, plan: Plan, slots: np.ndarray) -> Pages:
        """Slots are those of the encoder's tokens, which are written by the step that a request joins."""
        joined = np.fromiter((r.slot for r in plan.joined), np.int64, len(plan.joined))
        lens = self._encoder_lens[joined]
        positions = np.concatenate([np.arange(n) for n in lens]) if len(lens) else np.zeros(0, np.int64)
        longest = int(self._encoder_lens[slots].max())
        return self._pages(table, slots, longest, np.repeat(joined, lens), positions)

    def _encode(self, plan: Plan, rows: np.ndarray, slots: np.ndarray) -> Encoded:
        states = None
        if plan.joined:
            token_ids = np.concatenate([np.asarray(r.encoder_token_ids, np.int64) for r in plan.joined])
            starts = np.cumsum([0, *(len(r.encoder_token_ids) for r in plan.joined)], dtype=np.int32)
            states = self.model.encode(self._tensor(token_ids), self._tensor(starts))
        lens = self._encoder_lens
        return Encoded(states, self._tensor(lens[slots]), self._tensor(lens[rows]))

    def _sample(
        self, result: StepResult, logits: Tensor, slots: np.ndarray, lengths: np.ndarray, done: np.ndarray
    ) -> None:
        """Draw a token for each of the requests `done`, whose logits these are, and note it."""
        slots = slots[done]
        sampled = self.sampler.sample(logits, slots)
        room = lengths[done] < self._token_ids.shape[1]
        self._token_ids[slots[room], lengths[done][room]] = sampled.token_ids[room]  # of no use where there is an error
        tokens = sampled.token_ids.tolist()
        for index, slot, token in zip(done.tolist(), slots.tolist(), tokens, strict=True):
            if token >= 0:
                result.token_ids[index] = token
                self._outputs[slot].append(token)
        for row, found in enumerate(sampled.logprobs):
            if found is not None:
                result.logprobs[int(done[row])] = found
        for row, error in sampled.errors.items():
            result.errors[int(done[row])] = error

    def _score(
        self, request: Request, state: Tensor | tuple[Tensor, ...], start: int, count: int
    ) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt tokens that follow the `count` rows from `start` on."""
        first = request.num_computed + 1
        following = request.token_ids[first : min(first + count, request.num_prompt_tokens)]
        if not following:
            return []
        rows = self._tensor(np.arange(start, start + len(following)))
        logits = self._logits(state, rows)
        if self.on_logits is not None:
            self.on_logits(logits)
        return prompt_logprobs(logits, self._tensor(np.asarray(following)), request.params.prompt_logprobs)

    def _logits(self, state: Tensor | tuple[Tensor, ...], rows: Tensor) -> Tensor:
        picked = state[rows] if isinstance(state, Tensor) else tuple(part[rows] for part in state)
        return self.model.lm_head(self.model.finish(picked))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)
