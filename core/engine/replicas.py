"""Copies of a model behind one front end: data parallelism.

Decisions: a request goes where it has least to wait for and most of its prompt is known already; the requests made of
one prompt stay together. Each copy is an engine of its own, whose places are other processes, so that all compute at
once; a step begins a step in each copy and settles those that are done.
"""

from collections.abc import Callable
from multiprocessing.connection import wait

from torch import nn

from modelport.config import EngineConfig
from modelport.engine.engine import Engine
from modelport.loading.model import Description
from modelport.modeling.adapters import Adapters
from modelport.plugin import Plugins
from modelport.request import Request

TURN = 16
"""What an open request costs the next one, in tokens of a prompt: its share of the steps to come."""

PATIENCE = 1.0
"""Seconds to wait for any copy before one of them is waited for, and its workers are looked after."""


class Replicas:
    """As an `Engine`, of several.

    :raises ValueError: settings that do not go together; else as `Engine`.
    """

    is_remote = True

    def __init__(self, about: Description, plugins: Plugins, settings: EngineConfig, progress: bool = False):
        if settings.nnodes > 1:
            raise ValueError(
                f"data_parallel_size={settings.data_parallel_size} with nnodes={settings.nnodes}: copies lie on one "
                "machine; use executor='ray', or an engine on each machine"
            )
        self.engines: list[Engine] = []
        self._home: dict[Request, Engine] = {}  # of requests that have not ended
        try:
            for rank in range(settings.data_parallel_size):
                own = settings.model_copy(update={"data_parallel_rank": rank})
                self.engines.append(Engine(about, plugins, own, progress and rank == 0))
        except BaseException:
            self.shutdown()
            raise

    @property
    def model(self) -> nn.Module:
        return self.engines[0].model

    @property
    def max_model_len(self) -> int:
        return min(engine.max_model_len for engine in self.engines)

    @property
    def has_encoder(self) -> bool:
        return self.engines[0].has_encoder

    @property
    def adapters(self) -> Adapters | None:
        """As `Engine.adapters`."""
        return self.engines[0].adapters

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines)

    @property
    def token_text(self) -> Callable[[int], str] | None:
        return self.engines[0].token_text

    @token_text.setter
    def token_text(self, text: Callable[[int], str] | None) -> None:
        for engine in self.engines:
            engine.token_text = text

    def check_media(self, request: Request) -> None:
        """As `Engine.check_media`: whichever copy it goes to."""
        for engine in self.engines:
            engine.check_media(request)

    def add(self, request: Request) -> None:
        engine = self._home.get(request.leader) if request.leader is not None else None
        if engine is None:
            engine = min(self.engines, key=lambda engine: cost(engine, request))
        self._home[request] = engine
        engine.add(request)

    def abort(self, request: Request) -> None:
        """As `Engine.abort`."""
        engine = self._home.pop(request, None)
        if engine is not None:
            engine.abort(request)

    def step(self) -> list[Request]:
        """A step of every copy that has work, and the results of those that are done."""
        for engine in self.engines:
            engine.begin()
        busy = [engine for engine in self.engines if engine.is_under_way]
        done = [engine for engine in busy if not engine.waits_on()]
        if busy and not done:
            owners = {channel: engine for engine in busy for channel in engine.waits_on()}
            done = list(dict.fromkeys(owners[channel] for channel in wait(list(owners), PATIENCE))) or busy[:1]
        touched = [request for engine in done for request in engine.finish()]
        for request in touched:
            if request.finished:
                self._home.pop(request, None)
        return touched

    def restart_workers(self) -> None:
        """As `Engine.restart_workers`, of all copies."""
        self._home.clear()
        for engine in self.engines:
            engine.restart_workers()

    def shutdown(self) -> None:
        """As `Engine.shutdown`."""
        for engine in self.engines:
            engine.shutdown()


def cost(engine: Engine, request: Request) -> int:
    """How long `request` waits for its first token in `engine`, in tokens that have to be computed before."""
    before = [*engine.scheduler.running, *engine.scheduler.all_waiting()]
    known = engine.cache.lookup(request).num_tokens
    todo = sum(len(other.token_ids) - other.num_computed for other in before)
    return len(request.token_ids) - known + todo + TURN * len(before)


def start_engine(about: Description, plugins: Plugins, settings: EngineConfig, progress: bool) -> Engine | Replicas:
    """:raises ValueError: as `Engine` and `Replicas`."""
    kind = Engine if settings.data_parallel_size == 1 else Replicas
    return kind(about, plugins, settings, progress)
