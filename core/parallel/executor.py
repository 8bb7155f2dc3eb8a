"""Who runs a step on all places of a divided model; here: threads of this process, one for each place.

Decisions: an executor looks like a `Runner` to the engine, so that a model in one place has nothing between the two.
Threads take turns (`groups.ThreadHub`), so they are no faster than one place; they prove a division right, for every
architecture, in the time of a test, and let a debugger see all places at once.
"""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Protocol

from torch import Tensor, nn

from modelport.config import EngineConfig
from modelport.engine.memory import Limits, Memory
from modelport.engine.runner import StepResult
from modelport.engine.scheduler import Plan
from modelport.loading.model import Description
from modelport.modeling.rope import Rope
from modelport.parallel.groups import BrokenLink, Place, ThreadHub
from modelport.parallel.place_runner import Loaded, load_place
from modelport.parallel.tensor import Note
from modelport.plugin import Plugins

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """What an engine asks of those who run its steps.

    :ivar model: a part of the model, or all of it without weights; it tells what the whole can do.
    :ivar memory: what every place has: the same numbers of blocks and rows.
    :ivar rope: the one that sorts sequences by length, if there is one.
    :ivar is_remote: whether requests go to other processes, which functions cannot.
    """

    model: nn.Module
    memory: Memory
    rope: Rope | None
    is_remote: bool

    def step(self, plan: Plan) -> StepResult:
        """As `Runner.step`."""

    def submit(self, plan: Plan) -> None:
        """Begin a step; another one may be begun before its result is collected."""

    def collect(self) -> StepResult:
        """Result of the oldest step that was submitted and not collected."""

    def waits_on(self) -> list[object]:
        """Connections of which one becomes readable before `collect` has a result; none when it has one now."""

    def restart(self) -> None:
        """Build every place anew, whatever became of the old ones."""

    def describe(self) -> list[Note]:
        """What became of the layers, on the first place of each stage."""

    def shutdown(self) -> None:
        """Give everything back; no step follows."""


class ThreadExecutor:
    """All places in this process.

    :raises ValueError: as `load_place`.
    """

    is_remote = False

    def __init__(
        self, about: Description, plugins: Plugins, settings: EngineConfig, limits: Limits, progress: bool = False
    ):
        self._build = lambda: self._load(about, plugins, settings, limits, progress)
        self._build()

    def _load(
        self, about: Description, plugins: Plugins, settings: EngineConfig, limits: Limits, progress: bool
    ) -> None:
        tp_size, pp_size = settings.tensor_parallel_size, settings.pipeline_parallel_size
        hub = ThreadHub()
        self._hub, self._tp_size = hub, tp_size
        self._results: deque[StepResult] = deque()
        places = [Place.of(rank, tp_size, pp_size, hub.links(rank)) for rank in range(tp_size * pp_size)]
        self._pool = ThreadPoolExecutor(len(places), thread_name_prefix="modelport-place")
        self._loaded: list[Loaded] = self._everywhere(
            len(places),
            lambda i: load_place(about, plugins, settings, places[i], limits, progress and i == 0),
        )
        first = self._loaded[0]
        self.model, self.memory, self.recorder = first.model, first.memory, None
        self.rope = next((found.rope for found in self._loaded if found.rope is not None), None)
        self._samples = next(i for i, place in enumerate(places) if place.samples)

    @property
    def on_logits(self) -> Callable[[Tensor], None] | None:
        """As `Runner.on_logits`."""
        return self._loaded[self._samples].runner.on_logits

    @on_logits.setter
    def on_logits(self, see: Callable[[Tensor], None] | None) -> None:
        self._loaded[self._samples].runner.on_logits = see

    def step(self, plan: Plan) -> StepResult:
        return self._everywhere(len(self._loaded), lambda i: self._loaded[i].runner.step(plan))[self._samples]

    def describe(self) -> list[Note]:
        return [note for loaded in self._loaded[:: self._tp_size] for note in loaded.notes]

    def submit(self, plan: Plan) -> None:
        self._results.append(self.step(plan))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def waits_on(self) -> list[object]:
        return []

    def restart(self) -> None:
        self.shutdown()
        self._build()

    def shutdown(self) -> None:
        self._pool.shutdown(wait=False)

    def _everywhere(self, count: int, work: Callable[[int], object]) -> list:
        """Let every place do its part; an error of one is raised once all have stopped."""
        futures = [self._pool.submit(self._one, work, i) for i in range(count)]
        errors = [future.exception() for future in futures]
        real = [error for error in errors if error is not None and not isinstance(error, BrokenLink)]
        for error in (*real, *filter(None, errors)):
            raise error
        return [future.result() for future in futures]

    def _one(self, work: Callable[[int], object], index: int) -> object:
        self._hub.enter()
        failed = True
        try:
            found = work(index)
            failed = False
            return found
        finally:
            self._hub.leave(failed)


def executor_class(plugins: Plugins, name: str) -> Callable[..., Executor]:
    """What the setting `executor` names.

    :raises ValueError: no plugin offers it.
    """
    offered: dict[str, str] = {}
    for found in plugins.hook.register_executors():
        offered = {**found, **offered}
    if name not in offered:
        raise ValueError(f"executor={name!r} is offered by no plugin; there are {', '.join(sorted(offered)) or 'none'}")
    module, _, kind = offered[name].partition(":")
    return getattr(import_module(module), kind)


def start_executor(
    about: Description, plugins: Plugins, settings: EngineConfig, limits: Limits, progress: bool
) -> Executor:
    """Build every place's part of the model, as `settings.executor` says.

    :raises ValueError: the model cannot be divided so.
    """
    executor = executor_class(plugins, settings.executor)(about, plugins, settings, limits, progress)
    for note in executor.describe():
        logger.log(logging.DEBUG if note.divided else logging.INFO, "%s", note)
    return executor
