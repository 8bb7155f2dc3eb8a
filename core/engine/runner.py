"""One forward pass: from a plan to a `Batch`, through the model, to the next tokens.

Decisions: the runner keeps the tokens and blocks of running requests in tables, one row (slot) each, so that a step is
array arithmetic over the rows it uses and copies nothing that has not changed. It knows no queue and no text.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from modelport.batch import Adapted, Batch, Encoded, Media, Pages
from modelport.engine.cache import Group
from modelport.engine.crossing import Crossing, crossing
from modelport.engine.graphs import GraphRecorder
from modelport.engine.recording import PROMPTS, Recorder
from modelport.engine.sampler import Choice, Sampler, TokenLogprobs, prompt_logprobs
from modelport.engine.scheduler import Plan
from modelport.engine.transfer import send, to_device
from modelport.inputs.processor import MediaItem, PlacedItem
from modelport.kernels import cpu
from modelport.modeling.adapters import adapters_of
from modelport.modeling.decoder import Model, forward
from modelport.request import Request

logger = logging.getLogger(__name__)


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


@dataclass
class Flight:
    """A step on its way through the device, and what is needed to read its tokens.

    :ivar done: (rows,) int64, index into the plan's requests of those that get a token.
    :ivar places: (rows,) int32, where in its request each token will stand.
    :ivar choice: the tokens; None when no request gets one.
    """

    plan: Plan
    result: StepResult
    done: np.ndarray
    places: np.ndarray
    choice: Choice | None = None


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
        self.recorder: Recorder | GraphRecorder | None = None
        self.prompts: Recorder | None = None
        if device.type == "cuda":
            self.recorder = GraphRecorder(self._decode, states)
        elif cpu.lib is not None:
            self.recorder = Recorder(self._decode, states)
            self.prompts = Recorder(lambda *step: self._forward(*step), states, PROMPTS, self.recorder.memory)
        self.on_logits: Callable[[Tensor], None] | None = None  # sees every row of logits in order; for checks
        # Zeros are not touched until they are used: a large table costs memory only for the rows in use.
        self._token_ids = np.zeros((num_slots, max_model_len), dtype=np.int32)
        columns = -(-max_model_len // block_size)
        self._groups, self.by_length = groups, by_length
        self._blocks = [np.zeros((num_slots, columns), dtype=np.int32) for _ in groups]
        self._num_blocks = np.zeros((len(groups), num_slots), dtype=np.int32)
        self._encoder_lens = np.zeros(num_slots, dtype=np.int32)
        self._outputs: list[list[int]] = [[] for _ in range(num_slots)]
        self._axes = np.zeros((getattr(model, "num_axes", 0), num_slots, max_model_len), dtype=np.int32)
        self._media: dict[bytes, Tensor] = {}  # rows of encoded items
        self._media_errors: dict[bytes, str] = {}  # why an item's rows are NaN
        self._adapters = adapters_of(model)
        self._placed: dict[int, bytes] = {}  # digest of the adapter in each slot
        self._takes_media = self._encodes = hasattr(model, "embed_media")
        # an encoder's tokens are the same for all of a sequence; of media a row sees those before it
        self._reads_encoder = hasattr(model, "encode")
        self._crosses = any(group.cross for group in groups) and not self._reads_encoder

    def step(self, plan: Plan) -> StepResult:
        """Run the plan; keys and values are written, and a token is sampled for each request that reached its end."""
        return self.land(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: Plan, tokens: Tensor | None = None, sources: np.ndarray | None = None) -> Flight:
        """Begin a step; nothing waits for the device, unless media are encoded or prompts scored.

        :param tokens: (rows,) int64, on the device: what a step that has not landed chose.
        :param sources: (seqs,) int64: which of them is the last token of each request; -1 where the tables have it.
        """
        for slot in plan.left:
            self.sampler.remove(slot)
        for request in plan.joined:
            self._join(request)
        self._place_adapters(plan)
        slots, computed, lengths, counts = self._rows(plan)
        result = StepResult([-1] * len(slots))
        if self._encodes:
            self._encode_media(plan)
            result.errors.update(self._media_errors_of(plan))
        token_ids, batch = self._batch(plan, slots, computed, counts)
        done, ahead = np.flatnonzero(computed + counts == lengths), None
        if sources is not None and (sources >= 0).any():
            lacking = sources >= 0
            ends, ahead = np.cumsum(counts, dtype=np.int64) - 1, lacking[done]
            token_ids[self._tensor(ends[lacking])] = tokens[self._tensor(sources[lacking])]
        scored = {i: r for i, r in enumerate(plan.requests) if r.wants_prompt_logprobs}
        logits = None
        single = len(done) == len(token_ids) and not plan.joined and not scored
        if self.recorder is not None and single:
            logits = self.recorder.run(token_ids, batch)
        if logits is None:
            state = None if self.prompts is None else self.prompts.run(token_ids, batch)
            if state is None:
                state = self._forward(token_ids, batch)
            ends = np.cumsum(counts)
            for index, request in scored.items():
                first = ends[index] - counts[index]
                result.prompt_logprobs[index] = self._score(request, state, batch, first, counts[index])
            logits = self._logits(state, batch, self._tensor(ends[done] - 1)) if len(done) else None
        flight = Flight(plan, result, done, lengths[done])
        if logits is not None:
            if self.on_logits is not None:
                self.on_logits(logits)
            flight.choice = self.sampler.choose(logits, slots[done], ahead)
        return flight

    def land(self, flight: Flight) -> StepResult:
        """Wait for a step's tokens, and note them; steps land in the order in which they were launched."""
        result, done, choice = flight.result, flight.done, flight.choice
        if choice is None:
            return result
        sampled, slots, places = self.sampler.read(choice), choice.slots, flight.places
        # A request may have ended since the launch, and another one have its slot.
        mine = np.fromiter((not flight.plan.requests[i].finished for i in done), bool, len(done))
        kept = mine & (places < self._token_ids.shape[1])
        self._token_ids[slots[kept], places[kept]] = sampled.token_ids[kept]  # of no use where there is an error
        tokens = np.where(mine, sampled.token_ids, -1).tolist()
        for index, slot, token in zip(done.tolist(), slots.tolist(), tokens, strict=True):
            if token >= 0:
                result.token_ids[index] = token
                self._outputs[slot].append(token)
        for row, found in enumerate(sampled.logprobs):
            if found is not None:
                result.logprobs[int(done[row])] = found
        for row, error in sampled.errors.items():
            result.errors.setdefault(int(done[row]), error)
        return result

    def _place_adapters(self, plan: Plan) -> None:
        """Put the adapters of requests that join into their slots, where they do not lie yet."""
        for request in plan.joined:
            adapter, slot = request.adapter, request.adapter_slot
            if adapter is None or self._placed.get(slot) == adapter.digest:
                continue
            self._placed.pop(slot, None)  # if this fails, nobody knows what is there
            if self._adapters.place(slot, adapter):
                for recorder in (self.recorder, self.prompts):
                    if recorder is not None:
                        recorder.reset()
            self._placed[slot] = adapter.digest

    def _encode_media(self, plan: Plan) -> None:
        """Make the rows that this step needs, all items of a modality in one call; drop those that are not kept."""
        for digest in plan.forget:
            self._media.pop(digest, None)
            self._media_errors.pop(digest, None)
        slots = self._media_slots(plan)
        for modality, slot in dict.fromkeys((item.modality, slots.get(item.digest, -1)) for item in plan.encode):
            items = [i for i in plan.encode if i.modality == modality and slots.get(i.digest, -1) == slot]
            if self._adapters is not None:
                self._adapters.begin(slot if slot >= 0 else None)
            given = [item for item in items if item.embeds is not None]
            self._keep_rows(given, [item.embeds for item in given])
            items = [item for item in items if item.embeds is None]
            try:
                self._keep_rows(items, self._embed_media(modality, items))
            except Exception as error:
                if len(items) == 1:
                    self._note_unusable(items[0], error)
                    continue
                for item in items:  # one of them fails, and the others shall not
                    try:
                        self._keep_rows([item], self._embed_media(modality, [item]))
                    except Exception as error:
                        self._note_unusable(item, error)

    def _media_slots(self, plan: Plan) -> dict[bytes, int]:
        """Of each item that requests with an adapter have: where that adapter lies."""
        if self._adapters is None:
            return {}
        return {p.item.digest: r.adapter_slot for r in plan.requests if r.adapter_slot >= 0 for p in r.media}

    def _embed_media(self, modality: str, items: list[MediaItem]) -> list[Tensor]:
        if not items:
            return []
        tensors = [{name: send(t, self.device) for name, t in i.tensors.items()} for i in items]
        return self.model.embed_media(modality, tensors)

    def _keep_rows(self, items: list[MediaItem], rows: list[Tensor]) -> None:
        for item, found in zip(items, rows, strict=True):
            if len(found) != item.num_rows:
                raise ValueError(
                    f"embed_media gave {len(found)} rows for {item.num_rows} tokens of one {item.modality}"
                )
            if not torch.isfinite(found).all():
                raise ValueError(f"what the model makes of this {item.modality} is not finite")
            self._media[item.digest] = found.to(self.device)

    def _note_unusable(self, item: MediaItem, error: Exception) -> None:
        logger.warning("a %s could not be encoded", item.modality, exc_info=error)
        self._media_errors[item.digest] = f"the {item.modality} could not be encoded: {error}"
        if not item.num_keys:
            self._media[item.digest] = torch.full((item.num_rows, 1), torch.nan, device=self.device)

    def _media_errors_of(self, plan: Plan) -> dict[int, str]:
        if not self._media_errors:
            return {}
        return {
            index: self._media_errors[placed.item.digest]
            for index, (request, count) in enumerate(zip(plan.requests, plan.counts, strict=True))
            for placed in _reached(request, count)
            if placed.item.digest in self._media_errors
        }

    def _media_rows(self, plan: Plan, starts: np.ndarray) -> Media | None:
        """Rows of this step that media take."""
        rows, states = [], []
        for request, count, first in zip(plan.requests, plan.counts, starts.tolist(), strict=False):
            for placed in _reached(request, count) if request.media else ():
                places = placed.item.row_places + (placed.start - request.num_computed)
                low, high = np.searchsorted(places, (0, count))
                if low < high:
                    rows.append(places[low:high] + first)
                    found = self._media[placed.item.digest]
                    states.append(found[low:high].expand(-1, self._media_width(found)))
        if not rows:
            return None
        return Media(self._tensor(np.concatenate(rows).astype(np.int64)), torch.cat(states))

    def _media_width(self, found: Tensor) -> int:
        """Of rows that could not be made, whatever the others have."""
        return max(found.shape[1], *(kept.shape[1] for kept in self._media.values()))

    def _ends(self, plan: Plan, positions: np.ndarray, starts: np.ndarray) -> Tensor | None:
        """How many keys each row sees, when some see later ones."""
        ends = None
        for index, request in enumerate(plan.requests):
            for start, end in request.spans:
                first, last = max(start, request.num_computed), min(end, request.num_computed + plan.counts[index])
                if first < last:
                    ends = (positions + 1).astype(np.int32) if ends is None else ends
                    row = starts[index] - request.num_computed
                    ends[row + first : row + last] = end
        return None if ends is None else self._tensor(ends)

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
        if len(self._axes):
            self._seat_axes(request)

    def _seat_axes(self, request: Request) -> None:
        """Positions of a prompt as its media say; those after it count on from the largest."""
        rest = np.arange(self._axes.shape[2], dtype=np.int32)
        row, known = self._axes[:, request.slot], 0
        if request.axes is not None:
            known = request.axes.shape[1]
            row[:, :known] = request.axes
            rest = rest[: len(rest) - known] + (int(request.axes.max()) + 1)
        row[:, known:] = rest

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
        for group, table, counts, blocks in zip(
            self._groups, self._blocks, self._num_blocks, request.blocks, strict=True
        ):
            if group.cross and self._crosses:  # read from the request: as many as its media need
                continue
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
        crossed = self._crossing(plan, starts) if self._crosses else None
        encoded = self._encode(plan, rows, slots, starts) if self._reads_encoder else self._seen(crossed)
        batch = Batch(
            positions=self._tensor(positions),
            query_starts=self._tensor(starts),
            seq_lens=self._tensor(seq_lens),
            pages=tuple(
                self._media_pages(crossed)
                if group.cross and self._crosses
                else self._cross_pages(table, plan, slots)
                if group.cross
                else self._pages(table, slots, int(seq_lens.max()), rows, positions)
                for group, table in zip(self._groups, self._blocks, strict=True)
            ),
            state_slots=self._tensor(slots),
            max_query_len=max_query_len,
            length_classes=self._length_classes(plan) if self.by_length else None,
            encoded=encoded,
            media=self._media_rows(plan, starts) if self._media else None,
            ends=self._ends(plan, positions, starts) if self._takes_media and max_query_len > 1 else None,
            axes=tuple(self._tensor(axis[rows, positions].astype(np.int64)) for axis in self._axes) or None,
            adapters=self._adapted(plan, counts, crossed) if self._adapters is not None else None,
        )
        return self._tensor(self._token_ids[rows, positions].astype(np.int64)), batch

    def _adapted(self, plan: Plan, counts: np.ndarray, crossed: Crossing | None) -> Adapted | None:
        """Whose the rows are; None where no request of the step uses an adapter."""
        slots = np.fromiter((r.adapter_slot for r in plan.requests), np.int32, len(plan.requests))
        if (slots < 0).all():
            return None
        rows, states = np.repeat(slots, counts), None
        if self._reads_encoder:
            if plan.joined:
                states = self._encoder_slots(plan)
        elif crossed is not None and crossed.written:
            of = self._media_slots(plan)
            states = np.repeat([of.get(digest, -1) for digest in crossed.written],
                               [len(self._media[digest]) for digest in crossed.written]).astype(np.int32)  # fmt: skip
        return Adapted(
            self._tensor(rows),
            None if states is None else self._tensor(states),
            None if crossed is None else self._tensor(rows[crossed.rows]),
        )

    def _encoder_slots(self, plan: Plan) -> np.ndarray:
        """Of the encoder's tokens of this step (encoder tokens,) int32."""
        return np.repeat(
            np.asarray([r.adapter_slot for r in plan.joined], np.int32), [len(r.encoder_token_ids) for r in plan.joined]
        )

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

    def _crossing(self, plan: Plan, starts: np.ndarray) -> Crossing | None:
        group = next(number for number, group in enumerate(self._groups) if group.cross)
        return crossing(plan, starts.tolist(), group, self.block_size, self._media)

    def _media_pages(self, crossed: Crossing | None) -> Pages:
        if crossed is None:
            return Pages(self._tensor(np.zeros((0, 1), np.int32)), self._tensor(np.zeros(0, np.int64)))
        return Pages(self._tensor(crossed.block_table), self._tensor(crossed.slots))

    def _seen(self, crossed: Crossing | None) -> Encoded | None:
        """What cross attention reads of media, if any row sees some."""
        if crossed is None:
            return None
        return Encoded(
            torch.cat([self._media[digest] for digest in crossed.written]) if crossed.written else None,
            self._tensor(crossed.lens),
            self._tensor(crossed.ends),
            self._tensor(crossed.query_starts),
            int(np.diff(crossed.query_starts).max()),
            self._tensor(crossed.rows),
        )

    def _encode(self, plan: Plan, rows: np.ndarray, slots: np.ndarray, query_starts: np.ndarray) -> Encoded:
        states = None
        if plan.joined:
            token_ids = np.concatenate([np.asarray(r.encoder_token_ids, np.int64) for r in plan.joined])
            starts = np.cumsum([0, *(len(r.encoder_token_ids) for r in plan.joined)], dtype=np.int32)
            if self._adapters is not None:
                of_rows = self._encoder_slots(plan)
                self._adapters.begin(Adapted(self._tensor(of_rows)) if (of_rows >= 0).any() else None)
            states = self.model.encode(self._tensor(token_ids), self._tensor(starts))
        lens = self._encoder_lens
        return Encoded(
            states,
            self._tensor(lens[slots]),
            self._tensor(lens[rows]),
            self._tensor(query_starts),
            int(np.diff(query_starts).max()),
        )

    def _score(
        self, request: Request, state: Tensor | tuple[Tensor, ...], batch: Batch, start: int, count: int
    ) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt tokens that follow the `count` rows from `start` on."""
        first = request.num_computed + 1
        following = request.token_ids[first : min(first + count, request.num_prompt_tokens)]
        if not following:
            return []
        rows = self._tensor(np.arange(start, start + len(following)))
        logits = self._logits(state, batch, rows)
        if self.on_logits is not None:
            self.on_logits(logits)
        return prompt_logprobs(logits, self._tensor(np.asarray(following)), request.params.prompt_logprobs)

    def _logits(self, state: Tensor | tuple[Tensor, ...], batch: Batch, rows: Tensor) -> Tensor:
        if batch.adapters is not None:
            self._adapters.begin(Adapted(batch.adapters.slots[rows]))
        picked = state[rows] if isinstance(state, Tensor) else tuple(part[rows] for part in state)
        return self.model.lm_head(self.model.finish(picked))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)


def _reached(request: Request, count: int) -> Iterator[PlacedItem]:
    """The media of which this step computes tokens."""
    end = request.num_computed + count
    seen = {id(placed) for view in request.views if view.end > request.num_computed for placed in view.placed}
    return (
        placed
        for placed in request.media
        if placed.start < end and (placed.end > request.num_computed or id(placed) in seen)
    )
