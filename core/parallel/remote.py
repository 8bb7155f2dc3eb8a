"""The engine's side of a model that lies in other processes: plans go out, results come back, and nobody waits forever.

Decisions: while the engine waits it asks every worker now and then whether it lives; a thread of the worker answers
even while a step runs. One that is silent for `worker_timeout` is stopped or hung; one that is dead closes its
connection, which is known at once. A step that takes longer than `step_timeout` although all answer is blamed on those
who do not wait for others. In each case all workers are ended, since the others wait for the bad one; `restart` forks
new ones from agents that still have everything imported.
"""

import time
from collections import deque
from dataclasses import astuple, replace
from multiprocessing.connection import wait
from typing import Any, NoReturn

import torch

from modelport.config import EngineConfig
from modelport.engine.cache import BlockPool, Group
from modelport.engine.memory import Limits, Memory
from modelport.engine.runner import StepResult
from modelport.engine.scheduler import Plan
from modelport.loading.model import Description, build_empty
from modelport.modeling.rope import Rope, find_by_length
from modelport.parallel.channel import Frame, Kind
from modelport.parallel.fleet import Fleet, Member, WorkerError, local_fleet
from modelport.parallel.nodes import NodesLauncher
from modelport.parallel.tensor import Note
from modelport.parallel.wire import PlanWriter, read_result
from modelport.plugin import PluginError, Plugins

LOADING = 10
"""How many times longer than `worker_timeout` a worker may be silent while it loads: disks hold processes up."""


class RemoteExecutor:
    """Every place in a process of its own, on this machine or another.

    :param fleet: who starts the workers; it ends with the executor.
    :raises ValueError: the model cannot be divided so, or its files do not fit.
    :raises PluginError: a machine has other plugins than this one.
    :raises WorkerError: a worker ended before it was ready.
    """

    is_remote = True

    def __init__(
        self, about: Description, plugins: Plugins, settings: EngineConfig, limits: Limits, progress: bool, fleet: Fleet
    ):
        self._about, self._plugins, self._settings, self._limits = about, plugins, settings, limits
        self._progress, self._fleet = progress, fleet
        self._steps = 0
        try:
            self._start()
        except BaseException:
            self.shutdown()
            raise

    def _start(self) -> None:
        self._fleet.start(self._plugins)
        for member in self._fleet.members:
            member.channel.limit(self._settings.worker_timeout)
        hello = {
            "settings": self._settings.model_dump(mode="json"),
            "limits": astuple(self._limits),
            "progress": self._progress,
            "meet": self._meeting(),
        }
        self._send(Frame.of(Kind.LOAD, hello))
        ready = [frame.message for frame in self._answers(Kind.LOAD, self._fleet.members)]
        self.memory = _memory(ready[0])
        self.devices = [found["device"] for found in ready]
        self._notes = [Note(*n) for found in ready[:: self._settings.tensor_parallel_size] for n in found["notes"]]
        self.model = build_empty(self._about, self._plugins, self._settings)
        self.rope: Rope | None = None
        if ready[0]["by_length"]:
            for module in self.model.modules():
                if isinstance(module, Rope):
                    module.build_tables(torch.device("cpu"), self._limits.max_model_len)
            self.rope = find_by_length(self.model)
        self._writer, self._open = PlanWriter(), deque()  # numbers of steps that are under way

    def _meeting(self) -> dict[str, Any]:
        """Where workers find each other: a file within a machine, the first worker's port between several."""
        if not self._fleet.several_machines:
            return {"file": f"{self._fleet.folder}/meet-{time.monotonic_ns()}"}
        first = self._fleet.members[:1]
        self._send(Frame(Kind.MEET), first)
        return self._answers(Kind.MEET, first)[0].message

    def step(self, plan: Plan) -> StepResult:
        """As `Runner.step`.

        :raises WorkerError: a worker failed, ended or does not answer, now or before.
        """
        self._open.clear()  # of steps that somebody interrupted
        self.submit(plan)
        return self.collect()

    def submit(self, plan: Plan) -> None:
        """Begin a step; workers begin it when they are done with those before.

        :raises WorkerError: as `step`.
        """
        if not self._fleet.members:
            raise WorkerError("the model's workers have ended; restart_workers() starts new ones")
        self._steps += 1
        try:
            message, tensors = self._writer.write(plan)
            frame = Frame.of(Kind.STEP, message, self._steps, tensors)
            # media go to those who encode them: the first stage, and all where blocks read them
            first = self._settings.tensor_parallel_size
            every = not tensors or any(group.cross for group in self.memory.groups)
            self._send(frame, None if every else self._fleet.members[:first])
            if not every:
                self._send(replace(frame, packed=b""), self._fleet.members[first:])
        except WorkerError:
            self._fleet.kill()
            raise
        self._open.append(self._steps)

    def collect(self) -> StepResult:
        """Result of the oldest step that was submitted and not collected.

        :raises WorkerError: as `step`.
        """
        if not self._fleet.members:
            raise WorkerError("the model's workers have ended; restart_workers() starts new ones")
        try:
            frame = self._result(self._open[0])
        except WorkerError:
            self._fleet.kill()
            raise
        self._open.popleft()
        return read_result(frame.message)

    def waits_on(self) -> list[object]:
        """Connections of which one becomes readable before `collect` has a result."""
        return [member.channel for member in self._fleet.members]

    def restart(self) -> None:
        """End the workers, if there are any, and start new ones; what their caches held is lost.

        :raises WorkerError: as when the executor was made.
        """
        if not self._fleet.alive:
            raise WorkerError("the engine was shut down; make a new one")
        self._fleet.kill()
        try:
            self._start()
        except BaseException:
            self._fleet.kill()
            raise

    def describe(self) -> list[Note]:
        """What became of the layers, on the first place of each stage."""
        return self._notes

    def shutdown(self) -> None:
        """End the workers; calling it twice is fine."""
        self._fleet.end()

    @property
    def worker_pids(self) -> list[int]:
        return [member.pid for member in self._fleet.members]

    def _send(self, frame: Frame, members: list[Member] | None = None) -> None:
        for member in self._fleet.members if members is None else members:
            try:
                member.channel.send(frame)
            except BlockingIOError:
                self._silent(member)
            except OSError:
                self._gone(member)
            except BaseException:  # Ctrl-C in the middle of a message
                self._fleet.kill()
                raise

    def _result(self, number: int) -> Frame:
        """The next result; those of steps that somebody interrupted are passed over."""
        members = self._fleet.members
        watch = _Watch(members, self._settings.worker_timeout)
        until = time.monotonic() + self._settings.step_timeout
        while True:
            for _, frame in self._ready(members, watch):
                if frame.kind == Kind.RESULT and frame.number == number:
                    return frame
            if time.monotonic() > until:
                self._too_slow(watch)

    def _answers(self, kind: Kind, members: list[Member]) -> list[Frame]:
        """The next message of this kind from each of `members`, while all workers have to stay alive."""
        watch = _Watch(self._fleet.members, LOADING * self._settings.worker_timeout)
        found: dict[int, Frame] = {}
        while len(found) < len(members):
            for member, frame in self._ready(self._fleet.members, watch):
                if frame.kind == kind:
                    found[member.rank] = frame
        return [found[member.rank] for member in members]

    def _ready(self, members: list[Member], watch: "_Watch") -> list[tuple[Member, Frame]]:
        """What has come; waits until something does, or it is time to look after the workers."""
        found = []
        by_channel = {member.channel: member for member in members}
        for channel in wait(list(by_channel), watch.pause()):
            member = by_channel[channel]
            frame = self._receive(member)
            watch.heard(member, frame)
            found.append((member, frame))
        for member in watch.silent():
            self._silent(member)
        if watch.is_due():
            self._send(Frame(Kind.PING))
        return found

    def _receive(self, member: Member) -> Frame:
        try:
            frame = member.channel.receive()
        except BlockingIOError:
            self._silent(member)
        except (EOFError, OSError):
            self._gone(member)
        if frame.kind == Kind.ERROR:
            self._failed(member, frame.message)
        return frame

    def _failed(self, member: Member, told: dict[str, str]) -> NoReturn:
        if told["kind"] == "ValueError":
            raise ValueError(told["error"])
        if told["kind"] == "PluginError":
            raise PluginError(f"{member} fails: {told['error']}")
        time.sleep(0.1)  # it may only be the first to notice that another one has died
        ended = self._fleet.note_ends()
        for other in self._fleet.members:
            if other is not member and other.pid in ended:
                self._gone(other)
        raise WorkerError(f"{member} failed: {told['error']}\n{told['traceback']}")

    def _gone(self, member: Member) -> NoReturn:
        raise WorkerError(f"{member} {self._fleet.why(member)}; was there memory enough?") from None

    def _silent(self, member: Member) -> NoReturn:
        raise WorkerError(
            f"{member} has not answered for {self._settings.worker_timeout:g} s (worker_timeout): it is stopped or "
            "hangs, or its machine is cut off"
        ) from None

    def _too_slow(self, watch: "_Watch") -> NoReturn:
        at = [(member, watch.status.get(member.rank)) for member in self._fleet.members]
        busy = [f"{m} {s['at']} since {s['seconds']:g} s" for m, s in at if s is not None and not s["waits"]]
        raise WorkerError(
            f"step {self._open[0]} takes longer than step_timeout={self._settings.step_timeout:g} s: "
            + ("; ".join(busy) or "all workers wait for each other")
        )


class _Watch:
    """Who was heard when, during one wait."""

    def __init__(self, members: list[Member], timeout: float):
        now = time.monotonic()
        self._members, self._timeout, self._every = members, timeout, timeout / 4
        self._heard = {member.rank: now for member in members}
        self._next = now + self._every
        self.status: dict[int, dict[str, Any]] = {}

    def heard(self, member: Member, frame: Frame) -> None:
        self._heard[member.rank] = time.monotonic()
        if frame.kind == Kind.PONG:
            self.status[member.rank] = frame.message

    def pause(self) -> float:
        return max(0.0, min(self._next, min(self._heard.values()) + self._timeout) - time.monotonic())

    def silent(self) -> list[Member]:
        now = time.monotonic()
        return [m for m in self._members if now - self._heard[m.rank] >= self._timeout and not wait([m.channel], 0)]

    def is_due(self) -> bool:
        """Whether to ask everybody again; true once for each period."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._every
        return True


class ProcessExecutor(RemoteExecutor):
    """All places on this machine, or shared out between `nnodes` machines."""

    def __init__(
        self, about: Description, plugins: Plugins, settings: EngineConfig, limits: Limits, progress: bool = False
    ):
        super().__init__(
            about,
            plugins,
            settings,
            limits,
            progress,
            local_fleet(settings) if settings.nnodes == 1 else Fleet(settings, NodesLauncher(settings)),
        )


def _memory(ready: dict[str, Any]) -> Memory:
    groups = [Group(BlockPool(blocks), window, cross) for blocks, window, cross in ready["groups"]]
    return Memory(groups, ready["num_rows"], ready["max_model_len"], ready["shareable"], [])
