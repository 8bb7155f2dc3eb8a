"""`LLM` for scripts and `AsyncLLM` for servers, with vLLM's names; one engine under both.

Decisions: `LLM` steps the engine in the caller's thread, so a script has no other threads; `AsyncLLM` steps it in one
thread of its own. Everything is checked before anything runs: a bad prompt in a list costs none of the others. What
imports torch is imported when an engine is made, so that workers can start to import it at the same time.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import queue
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelport.config import EngineConfig
from modelport.parallel.fleet import starting
from modelport.sampling_params import SamplingParams
from modelport.settings import engine_config

if TYPE_CHECKING:
    from modelport.frontend import Frontend, Job, Message
    from modelport.inputs.tokenizer import Tokenizer
    from modelport.request import LoRARequest, Prompt, RequestOutput

logger = logging.getLogger(__name__)


class LLM:
    """A model, ready to generate.

    :param model: path of a checkpoint, or a name that a source knows.
    :param settings: any field of `EngineConfig`: `dtype`, `max_model_len`, `seed`, `plugins`, ...
    :raises FileNotFoundError: the model's files cannot be had.
    :raises ValueError: an unknown architecture or setting, or files that do not fit together.
    """

    def __init__(self, model: str, **settings: Any):
        self._front = _new_frontend(model, settings)

    @classmethod
    def over(cls, front: Frontend) -> LLM:
        """An `LLM` over a front end that was made apart, with plugins that were loaded before."""
        llm = cls.__new__(cls)
        llm._front = front
        return llm

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._front.tokenizer

    @property
    def max_model_len(self) -> int:
        return self._front.engine.max_model_len

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none."""
        return self._front.default_params()

    def restart_workers(self) -> None:
        """Start the workers of a divided model anew, after one has failed.

        :raises ValueError: the model is not divided.
        :raises RuntimeError: a worker ended before it was ready; this may be tried again.
        """
        self._front.engine.restart_workers()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | str | Sequence[LoRARequest | str | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs come in the order of the prompts.

        :param prompts: one prompt or a list: text, token ids, or dictionaries with either.
        :param sampling_params: one for all, or one for each.
        :param lora_request: the adapter to use, by a `LoRARequest` or by its name in `lora_modules`; one for all, or a
            list with one for each, None for the model as it is.
        :raises ValueError: a prompt, parameters or adapter that cannot be run; nothing has run then.
        """
        several = _as_list(prompts)
        params, adapters = _params_for(several, sampling_params), _adapters_for(several, lora_request)
        jobs = [self._front.job(p, s, None, a) for p, s, a in zip(several, params, adapters, strict=True)]
        return self._run(jobs, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | str | Sequence[LoRARequest | str | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, by the model's chat template; `lora_request` as for `generate`."""
        several = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        options = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "chat_template_kwargs": chat_template_kwargs,
        }
        prompts = [self._front.chat_prompt(conversation, options) for conversation in several]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | str | None = None,
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, and give what there is of it after every token.

        Streams may be read in turn; each reading runs the engine for all of them. Closing one early ends its request.
        """
        job = self._front.job(prompt, sampling_params, None, lora_request)
        return self._stream(job)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | str | None = None,
    ) -> Iterator[RequestOutput]:
        """`stream` for a conversation."""
        return self.stream(self._front.chat_prompt(messages, {}), sampling_params, lora_request=lora_request)

    def add_lora(self, lora_request: LoRARequest) -> None:
        """Read an adapter before it is needed.

        :raises ValueError: it cannot be served.
        """
        self._front.adapter(lora_request)

    def remove_lora(self, lora_int_id: int) -> bool:
        """Forget an adapter; requests that use it go on. Whether it was known."""
        return self._front.shelf is not None and self._front.shelf.remove(lora_int_id)

    def list_loras(self) -> set[int]:
        """`lora_int_id` of the adapters that are ready to be used."""
        return self._front.shelf.ids() if self._front.shelf is not None else set()

    def _stream(self, job: Job) -> Iterator[RequestOutput]:
        engine = self._front.engine
        try:
            for request in job.requests:
                engine.add(request)
            seen = 0
            while not job.finished:
                engine.step()
                made = sum(r.num_output_tokens for r in job.requests)
                if made > seen and not job.finished:
                    seen = made
                    yield job.output()
            yield job.output()
        finally:
            for request in job.requests:
                engine.abort(request)

    def _run(self, jobs: list[Job], use_tqdm: bool) -> list[RequestOutput]:
        engine = self._front.engine
        bar = _progress_bar(len(jobs)) if use_tqdm and sys.stderr.isatty() else None
        open_jobs = {id(request): job for job in jobs for request in job.requests}
        try:
            for job in jobs:
                for request in job.requests:
                    engine.add(request)
            while open_jobs:
                for request in engine.step():
                    if request.finished and id(request) in open_jobs:
                        job = open_jobs.pop(id(request))
                        if bar is not None and job.finished:
                            bar.update()
        finally:  # an interruption leaves an engine that can go on
            for job in jobs:
                for request in job.requests:
                    engine.abort(request)
            if bar is not None:
                bar.close()
        return [job.output() for job in jobs]


class AsyncLLM:
    """The same for asyncio: many callers, one engine, which runs in a thread of its own.

    :param model: as for `LLM`.
    :param settings: as for `LLM`.
    """

    def __init__(self, model: str, **settings: Any):
        self._front = _new_frontend(model, settings)
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._listeners: dict[int, tuple[Job, asyncio.AbstractEventLoop, asyncio.Queue]] = {}
        self._end: BaseException | None = None  # why the engine runs no more
        self._lock = threading.Lock()  # a listener either registers before the end, and is told, or sees the end
        self._restarting = threading.Lock()
        self._start_thread()

    def _start_thread(self) -> None:
        self._end = None
        self._thread = threading.Thread(target=self._work, name="modelport-engine", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._front.tokenizer

    @property
    def max_model_len(self) -> int:
        return self._front.engine.max_model_len

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt, and give what there is of it after every step that added to it.

        A caller that stops listening ends the request.

        :param lora_request: the adapter to use; its files are read the first time, while the engine goes on.
        :raises RuntimeError: the engine has failed or was shut down.
        """
        # reading and preparing media takes its time, and so does reading an adapter
        media = isinstance(prompt, Mapping) and prompt.get("multi_modal_data")
        reads = self._front.shelf is not None and lora_request is not None and not self._front.shelf.holds(lora_request)
        if media or reads:
            job = await asyncio.to_thread(self._front.job, prompt, sampling_params, request_id, lora_request)
        else:
            job = self._front.job(prompt, sampling_params, request_id, lora_request)
        async for output in self._listen(job):
            yield output

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """`generate` for a conversation; its messages may not name local files, unless a setting allows it."""
        prompt = await asyncio.to_thread(self._front.chat_prompt, messages, {}, False)
        async for output in self.generate(prompt, sampling_params, lora_request=lora_request):
            yield output

    async def add_lora(self, lora_request: LoRARequest) -> None:
        """As `LLM.add_lora`; the engine goes on meanwhile."""
        await asyncio.to_thread(self._front.adapter, lora_request)

    async def remove_lora(self, lora_int_id: int) -> bool:
        """As `LLM.remove_lora`."""
        return self._front.shelf is not None and self._front.shelf.remove(lora_int_id)

    async def list_loras(self) -> set[int]:
        """As `LLM.list_loras`."""
        return self._front.shelf.ids() if self._front.shelf is not None else set()

    async def restart_workers(self) -> None:
        """Start the workers of a divided model anew, after one has failed; requests that run now end with an error.

        :raises ValueError: the model is not divided.
        :raises RuntimeError: a worker ended before it was ready; this may be tried again.
        """
        await asyncio.to_thread(self._restart)

    def _restart(self) -> None:
        with self._restarting:
            self._stop_thread()
            while not self._commands.empty():  # of requests that have ended
                self._commands.get()
            self._front.engine.restart_workers()
            self._start_thread()

    def shutdown(self) -> None:
        """End all requests, the engine's thread and its workers; calling it twice is fine."""
        self._stop_thread()
        self._front.engine.shutdown()

    def _stop_thread(self) -> None:
        self._commands.put(("stop", None))
        self._thread.join()

    async def _listen(self, job: Job) -> AsyncIterator[RequestOutput]:
        outputs: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()
        with self._lock:
            if self._end is not None:
                raise RuntimeError("the engine is not running") from self._end
            self._listeners[id(job)] = (job, asyncio.get_running_loop(), outputs)
        self._commands.put(("add", job))
        try:
            while True:
                output = await outputs.get()
                while not outputs.empty():  # a slow listener gets the newest only: outputs are cumulative
                    output = outputs.get_nowait()
                if isinstance(output, BaseException):
                    raise RuntimeError("the engine failed while this request was running") from output
                yield output
                if output.finished:
                    return
        finally:
            self._listeners.pop(id(job), None)
            self._commands.put(("abort", job))

    def _work(self) -> None:
        """The engine's thread: take commands, step, tell listeners."""
        engine = self._front.engine
        owners: dict[int, Job] = {}
        end: BaseException = RuntimeError("the engine was shut down")
        try:
            while True:
                while not self._commands.empty() or not engine.has_work:
                    command, job = self._commands.get()
                    if command == "stop":
                        return
                    for request in job.requests:
                        if command == "add":
                            owners[id(request)] = job
                            engine.add(request)
                        else:
                            owners.pop(id(request), None)
                            engine.abort(request)
                touched = {id(job): job for r in engine.step() if (job := owners.get(id(r))) is not None}
                for job in touched.values():
                    self._tell(job, job.output())
        except Exception as error:
            end = error
            logger.exception("the engine failed; its requests end with an error")
        finally:
            with self._lock:
                self._end = end
            for job, _, _ in list(self._listeners.values()):
                self._tell(job, end)

    def _tell(self, job: Job, what: RequestOutput | BaseException) -> None:
        listener = self._listeners.get(id(job))
        if listener is not None:
            _, loop, outputs = listener
            loop.call_soon_threadsafe(outputs.put_nowait, what)


def _new_frontend(model: str, settings: Mapping[str, Any]) -> Frontend:
    wanted = engine_config(model, settings)
    if wanted.node_rank:
        raise ValueError(
            f"node_rank={wanted.node_rank}: only machine 0 has an engine; on the others run "
            f"`modelport generate --node-rank {wanted.node_rank} ...`, with the other settings as they are here"
        )
    with starting(wanted):
        from modelport.frontend import Frontend

        return Frontend(wanted, progress=sys.stderr.isatty())


def _signature() -> inspect.Signature:
    """The fields of `EngineConfig` as parameters, so that help() and editors show them."""
    parameter = inspect.Parameter
    fields = EngineConfig.model_fields.items()
    return inspect.Signature(
        [parameter("model", parameter.POSITIONAL_OR_KEYWORD, annotation=str)]
        + [
            parameter(name, parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation)
            for name, field in fields
            if name != "model"
        ]
    )


LLM.__signature__ = AsyncLLM.__signature__ = _signature()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    several = list(prompts)
    return [several] if several and not isinstance(several[0], str | Mapping | Sequence) else several


def _params_for(prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None) -> list:
    if params is None or isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if not isinstance(params, Sequence):
        raise TypeError(f"sampling_params must be SamplingParams or a list of them, not {type(params).__name__}")
    if len(params) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(params)} sampling_params; give one, or one for each prompt")
    return list(params)


def _adapters_for(
    prompts: list[Prompt], given: LoRARequest | str | Sequence[LoRARequest | str | None] | None
) -> Sequence[LoRARequest | str | None]:
    if not isinstance(given, list | tuple):
        return [given] * len(prompts)
    if len(given) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(given)} lora_requests; give one, or one for each prompt")
    return given


def _progress_bar(total: int):
    from tqdm import tqdm

    return tqdm(total=total, desc="Generating", unit=" prompts", delay=2.0)
