"""The engine: requests in, one step at a time, outputs out.

Decisions: `step` is plain calls, plan -> run -> settle, and knows neither prompts as text nor threads; what goes wrong
with one request ends that request alone. Where the device computes by itself, `lookahead` has the next step under way
before one is settled.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

from modelport.config import EngineConfig
from modelport.engine.adapters import AdapterSlots
from modelport.engine.cache import Cache
from modelport.engine.lookahead import Lookahead
from modelport.engine.media import MediaCache
from modelport.engine.memory import Limits, Memory, attach_memory
from modelport.engine.runner import Runner, StepResult
from modelport.engine.sampler import TokenLogprobs
from modelport.engine.scheduler import Plan, Scheduler
from modelport.loading.model import Description, build
from modelport.modeling.adapters import Adapters, adapters_of
from modelport.modeling.rope import Rope, find_by_length
from modelport.parallel.executor import Executor, start_executor
from modelport.plugin import Plugins
from modelport.request import Logprob, Request

logger = logging.getLogger(__name__)
CHUNK = {"cpu": 256, "cuda": 4096}
"""Tokens in one step when the user does not say: long enough for good matrix products, short enough that running
requests wait little for somebody's prompt."""
ALONE = {"cpu": 512, "cuda": 4096}
"""The same while nobody waits for a next token: what is to be done once for each step, and each layer, is done less."""

MEDIA_ROWS = 8192
"""Rows of encoded images, videos and sounds that are kept, if the longest request has no more."""


class Engine:
    """A loaded model with its cache and scheduler.

    :ivar is_remote: whether the model lies in other processes.
    :raises ValueError: settings that contradict each other or do not fit the machine.
    """

    def __init__(self, about: Description, plugins: Plugins, settings: EngineConfig, progress: bool = False):
        limit = about.text.longest_context
        if settings.max_model_len is not None and settings.max_model_len > limit:
            raise ValueError(
                f"max_model_len={settings.max_model_len} exceeds the {limit} positions of {about.checkpoint.name!r}"
            )
        chunk = settings.max_num_batched_tokens or max(CHUNK.get(about.device.type, 256), settings.max_num_seqs or 0)
        seqs = settings.max_num_seqs or min(256, chunk)
        if chunk < seqs:
            raise ValueError(
                f"max_num_batched_tokens={chunk} is less than max_num_seqs={seqs}: running requests would wait in turn;"
                " raise the first or lower the second"
            )
        wanted = settings.max_model_len or about.text.max_position_embeddings
        inputs = about.architecture.inputs
        span = 0 if inputs is None else wanted if inputs.longest_span is None else inputs.longest_span
        alone = chunk if settings.max_num_batched_tokens else max(chunk, ALONE.get(about.device.type, chunk))
        limits = Limits(wanted, seqs, max(alone, span))
        self.is_remote = False
        self._executor: Executor | None = None
        if settings.num_places == settings.data_parallel_size == 1:
            self.model = build(about, plugins, settings, wanted, progress)
            memory = attach_memory(self.model, settings, about.dtype, about.device, limits)
            rope = find_by_length(self.model)
            self.runner = Runner(
                self.model,
                about.text.vocab_size,
                memory.num_rows,
                memory.max_model_len,
                settings.block_size,
                memory.groups,
                memory.states,
                about.device,
                by_length=rope is not None,
            )
        else:
            self.runner = self._executor = start_executor(about, plugins, settings, limits, progress)
            self.model, memory, rope = self.runner.model, self.runner.memory, self.runner.rope
            self.is_remote = self.runner.is_remote
        self._settings, self._inputs, self._chunk, self._alone = settings, inputs, chunk, alone
        self._open(memory, rope)
        self.token_text: Callable[[int], str] | None = None  # text of one token, for log-probabilities

    def _open(self, memory: Memory, rope: Rope | None) -> None:
        """An empty cache and empty queues."""
        settings, alone, inputs = self._settings, self._alone, self._inputs
        self.max_model_len = memory.max_model_len
        self.cache = Cache(memory.groups, settings.block_size, settings.enable_prefix_caching and memory.shareable)
        rows = MEDIA_ROWS * (4 if any(group.cross for group in memory.groups) else 1)
        self._flying: deque[Plan] = deque()
        self._depth = 1 if self._executor is None else settings.pipeline_parallel_size
        media = None if inputs is None else MediaCache(max(memory.max_model_len, rows), alone)
        adapters = None if self.adapters is None else AdapterSlots(settings.max_loras)
        self.scheduler = Scheduler(
            self.cache,
            memory.num_rows,
            alone,
            rope.length_class if rope else None,
            media,
            adapters,
            while_decoding=self._chunk,
        )
        self.lookahead: Lookahead | None = None
        if self._executor is None and self.runner.device.type == "cuda":
            self.look_ahead()

    def look_ahead(self) -> None:
        """From now on launch the next step while one runs, which is of use where the device computes by itself."""
        self.lookahead = Lookahead(self.scheduler, self.runner, self._settle)

    def shutdown(self) -> None:
        """End the processes of a divided model; no step follows."""
        if self._executor is not None:
            self._executor.shutdown()

    def restart_workers(self) -> None:
        """Start the places of a divided model anew, after one has failed or to have fresh ones.

        Requests that are in the engine end with an error; what the cache held is lost.

        :raises ValueError: the model is not divided.
        :raises RuntimeError: a worker ended before it was ready; this may be tried again.
        """
        if self._executor is None:
            raise ValueError("restart_workers: this model runs in one place and has no workers; make a new engine")
        for request in (*self.scheduler.running, *self.scheduler.all_waiting()):
            self._end(request, "error", "the workers were restarted")
        self._executor.restart()
        self.model = self._executor.model
        self._open(self._executor.memory, self._executor.rope)

    @property
    def has_encoder(self) -> bool:
        """Whether prompts go to an encoder."""
        return hasattr(self.model, "encode")

    @property
    def adapters(self) -> Adapters | None:
        """What reads adapters; None when the model takes none."""
        return adapters_of(self.model)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def check_media(self, request: Request) -> None:
        """:raises ValueError: cross attention to its media needs more room than there is."""
        most = max((view.num_keys for view in request.views), default=0)
        if most and (most > self.scheduler.media.capacity or not self.cache.room_for_media(request)):
            keys = sum(view.num_keys for view in request.views)
            raise ValueError(
                f"the media of the prompt have {keys} keys, for which the cache has no room; send fewer or smaller "
                "ones, or raise kv_cache_memory_bytes or num_kv_blocks"
            )

    def add(self, request: Request) -> None:
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs.append(None)  # nothing precedes the first token
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """End `request` now, wherever it is; nothing happens when it has ended."""
        if not request.finished:
            self._end(request, "abort", None)

    def step(self) -> list[Request]:
        """Run one step; the requests that got a token or ended."""
        if self._depth > 1:
            self.begin()
            return self.finish()
        if self.lookahead is not None:
            return self.lookahead.step()
        plan = self.scheduler.plan()
        if not plan.requests:
            return []
        return self._settle(plan, self.runner.step(plan))

    @property
    def is_under_way(self) -> bool:
        """Whether `finish` has something to settle."""
        return bool(self._flying)

    def waits_on(self) -> list[object]:
        """As `Executor.waits_on`."""
        return self._executor.waits_on()

    def begin(self) -> None:
        """Keep a step for each stage of a divided model under way."""
        while len(self._flying) < self._depth:
            plan = self.scheduler.plan(self._depth)
            if not plan.requests:
                break
            self._executor.submit(plan)
            self.scheduler.send_off(plan)
            self._flying.append(plan)

    def finish(self) -> list[Request]:
        """Settle the oldest step that is under way, as `step` does."""
        if not self._flying:
            return []
        result = self._executor.collect()
        plan = self._flying.popleft()
        self.scheduler.back(plan)
        return self._settle(plan, result)

    def _settle(self, plan: Plan, result: StepResult) -> list[Request]:
        now = time.monotonic()
        touched = []
        for index, (request, count) in enumerate(zip(plan.requests, plan.counts, strict=True)):
            if request.finished:  # somebody ended it while its step was under way
                continue
            if index in result.prompt_logprobs:
                del request.prompt_logprobs[request.num_computed + 1 :]  # scored again after a preemption
                following = request.token_ids[request.num_computed + 1 :]
                for token, found in zip(following, result.prompt_logprobs[index], strict=False):
                    request.prompt_logprobs.append(self._named(token, found))
            if index in result.errors:  # what it has computed is not to be shared
                self._end(request, "error", result.errors[index])
                touched.append(request)
                continue
            self.scheduler.computed(request, count)
            if result.token_ids[index] >= 0:
                if request.metrics.first_token_time is None:
                    request.metrics.first_token_time = now
                self._take(request, result.token_ids[index], result.logprobs.get(index))
                touched.append(request)
        return touched

    def _take(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> None:
        """Append a sampled token, and end the request if this was its last."""
        request.token_ids.append(token)
        if logprobs is not None:
            request.logprobs.append(self._named(token, logprobs))
            request.cumulative_logprob += logprobs.logprob
        params, text = request.params, request.detokenizer
        may_stop = request.num_output_tokens >= max(params.min_tokens, 1)
        stops = may_stop and (
            (not params.ignore_eos and token in request.eos_token_ids) or token in (params.stop_token_ids or ())
        )
        found = None
        if text is not None and (not stops or params.include_stop_str_in_output):
            found = text.append(token)
        if stops:
            is_eos = not params.ignore_eos and token in request.eos_token_ids
            self._end(request, "stop", None if is_eos else token)
        elif found is not None:
            self._end(request, "stop", found)
        elif len(request.token_ids) >= request.max_total_tokens:
            self._end(request, "length", None)

    def _end(self, request: Request, reason: str, why: int | str | None) -> None:
        request.finish_reason, request.stop_reason = reason, why
        request.metrics.finished_time = time.monotonic()
        if request.detokenizer is not None:
            request.detokenizer.finish()
        self.scheduler.finish(request)

    def _named(self, token: int, found: TokenLogprobs) -> dict[int, Logprob]:
        name = self.token_text or (lambda _: None)
        entry = {token: Logprob(found.logprob, found.rank, name(token))}
        for rank, (other, value) in enumerate(zip(found.top_ids, found.top_logprobs, strict=True), start=1):
            entry.setdefault(other, Logprob(value, rank, name(other)))
        return entry
