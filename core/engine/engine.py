"""The engine: requests in, one step at a time, outputs out.

Decisions: `step` is plain calls, plan -> run -> settle, and knows neither prompts as text nor threads; what goes wrong
with one request ends that request alone.
"""

import logging
import time
from collections.abc import Callable

from modelport.config import EngineConfig
from modelport.engine.cache import Cache
from modelport.engine.memory import Limits, attach_memory
from modelport.engine.runner import Runner, StepResult
from modelport.engine.sampler import TokenLogprobs
from modelport.engine.scheduler import Plan, Scheduler
from modelport.loading.model import Description, build
from modelport.modeling.rope import find_by_length
from modelport.parallel.executor import start_executor
from modelport.plugin import Plugins
from modelport.request import Logprob, Request

logger = logging.getLogger(__name__)
CHUNK = 256
"""Tokens in one step when the user does not say: long enough for good matrix products, short enough that running
requests wait little for somebody's prompt."""


class Engine:
    """A loaded model with its cache and scheduler.

    :ivar is_remote: whether the model lies in other processes.
    :raises ValueError: settings that contradict each other or do not fit the machine.
    """

    def __init__(self, about: Description, plugins: Plugins, settings: EngineConfig, progress: bool = False):
        limit = about.config.max_position_embeddings
        if settings.max_model_len is not None and settings.max_model_len > limit:
            raise ValueError(
                f"max_model_len={settings.max_model_len} exceeds the {limit} positions of {about.checkpoint.name!r}"
            )
        chunk = settings.max_num_batched_tokens or max(CHUNK, settings.max_num_seqs or 0)
        seqs = settings.max_num_seqs or min(256, chunk)
        if chunk < seqs:
            raise ValueError(
                f"max_num_batched_tokens={chunk} is less than max_num_seqs={seqs}: running requests would wait in turn;"
                " raise the first or lower the second"
            )
        wanted = settings.max_model_len or limit
        limits = Limits(wanted, seqs, chunk)
        self.is_remote = False
        if settings.num_places == 1:
            self.model = build(about, plugins, settings, wanted, progress)
            memory = attach_memory(self.model, settings, about.dtype, about.device, limits)
            rope = find_by_length(self.model)
            self.runner = Runner(
                self.model,
                about.config.vocab_size,
                memory.num_rows,
                memory.max_model_len,
                settings.block_size,
                memory.groups,
                memory.states,
                about.device,
                by_length=rope is not None,
            )
        else:
            self.runner = start_executor(about, plugins, settings, limits, progress)
            self.model, memory, rope = self.runner.model, self.runner.memory, self.runner.rope
            self.is_remote = self.runner.is_remote
        self.max_model_len = memory.max_model_len
        self.cache = Cache(memory.groups, settings.block_size, settings.enable_prefix_caching and memory.shareable)
        self.scheduler = Scheduler(self.cache, memory.num_rows, chunk, rope.length_class if rope else None)
        self.token_text: Callable[[int], str] | None = None  # text of one token, for log-probabilities

    @property
    def has_encoder(self) -> bool:
        """Whether prompts go to an encoder."""
        return hasattr(self.model, "encode")

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

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
        plan = self.scheduler.plan()
        if not plan.requests:
            return []
        return self._settle(plan, self.runner.step(plan))

    def _settle(self, plan: Plan, result: StepResult) -> list[Request]:
        now = time.monotonic()
        touched = []
        for index, (request, count) in enumerate(zip(plan.requests, plan.counts, strict=True)):
            if index in result.prompt_logprobs:
                del request.prompt_logprobs[request.num_computed + 1 :]  # scored again after a preemption
                following = request.token_ids[request.num_computed + 1 :]
                for token, found in zip(following, result.prompt_logprobs[index], strict=False):
                    request.prompt_logprobs.append(self._named(token, found))
            self.scheduler.computed(request, count)
            if index in result.errors:
                self._end(request, "error", result.errors[index])
                touched.append(request)
            elif result.token_ids[index] >= 0:
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
