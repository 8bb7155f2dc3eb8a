"""The agents of all machines and the workers they fork, seen from the engine.

Decisions: an agent can be started before anything heavy is imported here (`starting`), so that it imports beside us.
Whatever happens to this process, its connections close, and agents and workers end themselves by that; `Fleet.end` only
makes sure. A launcher knows how an agent comes to run on a machine, and nothing else.
"""

from __future__ import annotations

import contextvars
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Protocol

from modelport.discovery import PluginError
from modelport.parallel.channel import Channel, Frame, Kind, Listener

if TYPE_CHECKING:
    from modelport.config import EngineConfig
    from modelport.plugin import Plugins

PATIENCE = 2.0
"""Seconds that processes get to end by themselves."""

START_TIMEOUT = 300.0
"""Seconds in which an agent has to connect and to load its plugins."""


class WorkerError(RuntimeError):
    """A worker process failed, ended, or does not answer; all others were ended with it."""


class Launcher(Protocol):
    """How agents come to run.

    :ivar num_agents: one for each machine.
    :ivar first_device: number of a machine's first GPU that is not another copy's, of those that its agent sees.
    """

    num_agents: int
    first_device: int

    def listen(self) -> Listener:
        """What agents connect to."""

    def launch(self, node: int, address: str) -> None:
        """Have the agent of this machine run, or wait for whoever starts it."""

    def complaint(self, node: int) -> str | None:
        """Why an agent that was launched will not connect; None while it may."""

    def end(self) -> None:
        """End what was launched; nothing is launched after that."""


class LocalLauncher:
    """One agent on this machine, behind a socket in a folder that only this user can enter."""

    num_agents = 1

    def __init__(self, settings: EngineConfig):
        self.first_device = settings.data_parallel_rank * settings.num_places
        self._early = {"plugins": list(settings.plugins), "blocked": list(settings.blocked_plugins)}
        self._threads = max(1, len(os.sched_getaffinity(0)) // (settings.num_places * settings.data_parallel_size))
        self._folder = tempfile.TemporaryDirectory(prefix="modelport-", ignore_cleanup_errors=True)
        self._process: subprocess.Popen | None = None

    @property
    def folder(self) -> str:
        return self._folder.name

    def listen(self) -> Listener:
        return Listener(f"{self._folder.name}/engine")

    def launch(self, node: int, address: str) -> None:
        self._stop()
        self._process = start_agent(address, node, self._threads, self._early)

    def complaint(self, node: int) -> str | None:
        code = None if self._process is None else self._process.poll()
        return None if code is None else how_ended(code)

    def end(self) -> None:
        self._stop()
        self._folder.cleanup()

    def _stop(self) -> None:
        if self._process is not None:
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def start_agent(
    address: str, node: int, threads: int, early: dict[str, list[str]], environment: dict[str, str] | None = None
) -> subprocess.Popen:
    """Start an agent on this machine.

    :param threads: of each worker, unless the user has said so in the environment.
    :param early: `plugins` and `blocked_plugins` of the settings, to import what is needed soon.
    """
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # it would start its threads when NumPy is imported, and agents fork
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # modules that plugins= names
        **(environment or {}),
    }
    command = [sys.executable, "-m", "modelport.parallel.agent", address, str(node), json.dumps(early)]
    # Ctrl-C reaches all processes of a terminal; this one ignores it from its first moment on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def how_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@dataclass
class Member:
    """A worker.

    :ivar node: of the agent that forked it.
    """

    rank: int
    node: int
    channel: Channel
    host: str
    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}, process {self.pid} on {self.host},"


class Fleet:
    """Agents and workers; what it holds is given back by `end`, when it is forgotten, or when Python ends."""

    def __init__(self, settings: EngineConfig, launcher: Launcher):
        self._settings, self._launcher = settings, launcher
        if settings.num_places % launcher.num_agents:
            raise ValueError(
                f"{settings.num_places} places cannot be shared out evenly between {launcher.num_agents} machines; "
                "choose tensor_parallel_size and pipeline_parallel_size so that their product can"
            )
        self._each = settings.num_places // launcher.num_agents
        self._listener = launcher.listen()
        self._agents: dict[int, tuple[Channel, str]] = {}  # by node: with its host
        self._ended: dict[int, int] = {}  # exit codes by process
        self.members: list[Member] = []
        self._end = weakref.finalize(self, _end, self._agents, self.members, self._listener, launcher)
        self._launched: set[int] = set()

    def launch(self) -> None:
        """Have an agent run on every machine; this does not wait for it."""
        for node in range(self._launcher.num_agents):
            if node not in self._agents and node not in self._launched:
                self._launcher.launch(node, self._listener.address)
                self._launched.add(node)

    @property
    def alive(self) -> bool:
        return self._end.alive

    @property
    def several_machines(self) -> bool:
        return self._listener.address.startswith("tcp:")

    @property
    def folder(self) -> str:
        """For files that workers of this machine share."""
        return os.path.dirname(self._listener.address.removeprefix("unix:"))

    def start(self, plugins: Plugins) -> None:
        """Fork all workers; agents that are missing are launched.

        :raises PluginError: a machine has other plugins than this one.
        :raises WorkerError: an agent or worker ended before it was ready.
        """
        self._drop_lost()
        self.launch()
        self._gather_agents()
        self._compare(plugins)
        self._ended.clear()  # what is told from now on concerns the new ones
        for node, (channel, _) in self._agents.items():
            ranks = range(node * self._each, (node + 1) * self._each)
            numbered = [[rank, device] for device, rank in enumerate(ranks, self._launcher.first_device)]
            channel.send(Frame.of(Kind.FORK, {"ranks": numbered}))
        self._gather_workers()

    def kill(self) -> None:
        """End all workers now; agents stay, and `start` forks new ones."""
        for member in self.members:
            member.channel.close()
        self.members.clear()
        for node, (channel, _) in list(self._agents.items()):
            try:
                channel.send(Frame(Kind.KILL))
            except OSError:
                self._lose(node)
                continue
            until = time.monotonic() + PATIENCE
            while (frame := self._hear(node, until)) is not None and frame.kind != Kind.KILL:
                pass

    def end(self) -> None:
        """End everything; calling it twice is fine."""
        self._end()

    def why(self, member: Member) -> str:
        """How a worker ended, which its agent has to say."""
        until = time.monotonic() + PATIENCE
        while member.pid not in self._ended and member.node in self._agents:
            if self._hear(member.node, until) is None:
                break
        if member.pid in self._ended:
            return how_ended(self._ended[member.pid])
        return "closed its connection" if member.node in self._agents else "was lost with its machine's agent"

    def note_ends(self) -> dict[int, int]:
        """Exit codes, by process, of workers whose end agents have told by now."""
        for node in list(self._agents):
            while wait([self._agents[node][0]], 0):
                if self._hear(node, 0) is None:
                    break
        return self._ended

    def _hear(self, node: int, until: float) -> Frame | None:
        """The next message of an agent; None when none comes in time, and when the agent is lost."""
        channel, _ = self._agents[node]
        if not wait([channel], max(0.0, until - time.monotonic())):
            return None
        try:
            frame = channel.receive()
        except (EOFError, OSError):
            self._lose(node)
            return None
        if frame.kind == Kind.ENDED:
            self._ended[frame.message["pid"]] = frame.message["code"]
        return frame

    def _lose(self, node: int) -> None:
        self._agents.pop(node)[0].close()
        self._launched.discard(node)

    def _drop_lost(self) -> None:
        for node in list(self._agents):
            while node in self._agents and wait([self._agents[node][0]], 0):
                self._hear(node, 0)

    def _gather_agents(self) -> None:
        until = time.monotonic() + START_TIMEOUT
        while missing := set(range(self._launcher.num_agents)) - set(self._agents):
            channel, hello = self._accept(until, missing)
            node = hello.get("node")
            if node in missing:
                self._agents[node] = (channel, hello["host"])
            else:
                channel.close()

    def _accept(self, until: float, missing: set[int]) -> tuple[Channel, dict[str, Any]]:
        """The next agent or worker that connects, and what it says of itself."""
        while True:
            if wait([self._listener], 0.1):
                channel = self._listener.accept()
                if channel is not None:
                    channel.limit(PATIENCE)
                    try:
                        return channel, channel.receive().message
                    except (EOFError, OSError):
                        channel.close()
            for node in missing:
                if (why := self._launcher.complaint(node)) is not None:
                    raise WorkerError(f"the agent of machine {node} {why} before it was ready")
            if time.monotonic() > until:
                nodes = ", ".join(map(str, sorted(missing)))
                raise WorkerError(
                    f"machine {nodes} has not connected to {self._listener.address} within {START_TIMEOUT:.0f} s; "
                    "is its agent started, with the same MODELPORT_SECRET?"
                )

    def _compare(self, plugins: Plugins) -> None:
        """Every machine loads our plugins, and says what hinders it."""
        wanted = plugins.manifest().plugins
        problems = []
        for channel, _ in self._agents.values():
            channel.send(Frame.of(Kind.PLUGINS, {"plugins": wanted}))
        until = time.monotonic() + START_TIMEOUT
        for node, (_, host) in list(self._agents.items()):
            while (frame := self._hear(node, until)) is not None and frame.kind != Kind.PLUGINS:
                pass
            if frame is None:
                why = self._launcher.complaint(node) or "is lost or does not answer"
                raise WorkerError(f"the agent of machine {node}, {host}, {why}, while it loaded its plugins")
            problems += [f"{host} {problem}" for problem in frame.message["problems"]]
        if problems := list(dict.fromkeys(problems)):
            raise PluginError(
                f"{'; '.join(problems)}; workers need the plugins of the engine on {socket.gethostname()}: install "
                "the same packages on every machine, or name modules in plugins=[...]"
            )

    def _gather_workers(self) -> None:
        found: dict[int, Member] = {}
        until = time.monotonic() + START_TIMEOUT
        tp_size, pp_size = self._settings.tensor_parallel_size, self._settings.pipeline_parallel_size
        while len(found) < self._settings.num_places:
            if not wait([self._listener], 0.05):
                if self.note_ends() or len(self._agents) < self._launcher.num_agents:
                    raise WorkerError("a worker ended as soon as it was started; its machine's log says why")
                if time.monotonic() < until:
                    continue
            channel, hello = self._accept(until, set())
            rank = hello.get("rank")
            if rank is None or rank in found:
                channel.close()
                continue
            name = (
                f"worker {rank} (tensor-parallel part {rank % tp_size} of {tp_size}, stage {rank // tp_size} of "
                f"{pp_size})"
            )
            found[rank] = Member(rank, rank // self._each, channel, hello["host"], hello["pid"], name)
        self.members.extend(found[rank] for rank in sorted(found))


def _end(agents: dict[int, tuple[Channel, str]], members: list[Member], listener: Listener, launcher: Launcher) -> None:
    """Runs once."""
    for member in members:
        member.channel.close()
    for channel, _ in agents.values():
        channel.close()
    listener.close()
    launcher.end()


_EARLY: contextvars.ContextVar[list[Fleet] | None] = contextvars.ContextVar(
    "fleets that were started early", default=None
)


@contextmanager
def starting(settings: EngineConfig) -> Iterator[None]:
    """Within it, an engine is being made: the agent that it will need starts now, and ends if nobody took it."""
    if settings.num_places * settings.data_parallel_size == 1 or settings.executor != "mp" or settings.nnodes > 1:
        yield
        return
    fleets: list[Fleet] = []
    token = _EARLY.set(fleets)
    try:
        for rank in range(settings.data_parallel_size):
            own = settings.model_copy(update={"data_parallel_rank": rank})
            fleets.append(Fleet(own, LocalLauncher(own)))
            fleets[-1].launch()
        yield
    finally:
        for fleet in fleets:  # nobody has taken
            fleet.end()
        _EARLY.reset(token)


def local_fleet(settings: EngineConfig) -> Fleet:
    """The one that `starting` has started, or a new one."""
    early = _EARLY.get()
    return early.pop(0) if early else Fleet(settings, LocalLauncher(settings))
