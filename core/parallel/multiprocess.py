"""One process for each place of a divided model, on this machine: `distributed_executor_backend="mp"`.

Decisions: workers are started as programs of their own and inherit a socket, not by `multiprocessing`, so a script
needs no `if __name__ == "__main__"`; they find each other through a file that only this user can read. The engine waits
for the sockets of all workers at once: one that dies closes its own, and that ends the step within milliseconds. Then
all are ended, since the others wait for the dead one; an engine is made anew to go on.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import astuple
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from modelport.config import EngineConfig
from modelport.engine.cache import BlockPool, Group
from modelport.engine.memory import Limits, Memory
from modelport.engine.runner import StepResult
from modelport.engine.scheduler import Plan
from modelport.loading.model import Description, build_empty
from modelport.modeling.rope import Rope, find_by_length
from modelport.parallel.tensor import Note
from modelport.parallel.wire import PlanWriter, decode, encode, read_result
from modelport.plugin import PluginError, Plugins

PATIENCE = 2.0
"""Seconds that workers get to end by themselves."""


class WorkerError(RuntimeError):
    """A worker process failed or ended; all others were ended with it."""


class ProcessExecutor:
    """Every place in a process of its own.

    :raises ValueError: the model cannot be divided so, or its files do not fit.
    :raises PluginError: a worker sees other plugins than this process.
    :raises WorkerError: a worker ended before it was ready.
    """

    is_remote = True

    def __init__(
        self, about: Description, plugins: Plugins, settings: EngineConfig, limits: Limits, progress: bool = False
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="modelport-")  # readable by this user alone
        self._pids: list[subprocess.Popen] = []
        self._sockets: list[Connection] = []
        self._end = weakref.finalize(self, _end, self._pids, self._sockets, self._folder)
        self._names = [
            f"worker {rank} (tensor-parallel part {rank % settings.tensor_parallel_size} of "
            f"{settings.tensor_parallel_size}, stage {rank // settings.tensor_parallel_size} of "
            f"{settings.pipeline_parallel_size})"
            for rank in range(settings.num_places)
        ]
        try:
            self._start(about, plugins, settings, limits, progress)
        except BaseException:
            self.shutdown()
            raise

    def _start(
        self, about: Description, plugins: Plugins, settings: EngineConfig, limits: Limits, progress: bool
    ) -> None:
        hello = {
            "settings": settings.model_dump(mode="json"),
            "limits": astuple(limits),
            "progress": progress,
            "meet": f"file://{self._folder.name}/meet",
        }
        for rank in range(settings.num_places):
            process, connection = _spawn(rank, settings.num_places)
            self._pids.append(process)
            self._sockets.append(connection)
            connection.send_bytes(encode(hello))
        self._compare(plugins, [decoded["plugins"] for decoded in self._answers()])
        ready = self._answers()
        self.memory = _memory(ready[0])
        self._notes = [Note(*note) for found in ready[:: settings.tensor_parallel_size] for note in found["notes"]]
        self.model = build_empty(about, plugins, settings)
        self.rope: Rope | None = None
        if ready[0]["by_length"]:
            for module in self.model.modules():
                if isinstance(module, Rope):
                    module.build_tables(torch.device("cpu"), limits.max_model_len)
            self.rope = find_by_length(self.model)
        self._writer, self._steps = PlanWriter(), 0

    def step(self, plan: Plan) -> StepResult:
        """As `Runner.step`.

        :raises WorkerError: a worker failed or ended, now or before.
        """
        if not self._end.alive:
            raise WorkerError("the model's workers have ended; make a new engine")
        self._steps += 1
        message = encode({"step": self._steps, **self._writer.write(plan)})
        try:
            for rank, connection in enumerate(self._sockets):
                try:
                    connection.send_bytes(message)
                except OSError:
                    self._fail(rank)
            while True:
                for connection in wait(self._sockets):
                    found = self._receive(self._sockets.index(connection))
                    if found["step"] == self._steps:  # else of a step that somebody interrupted
                        return read_result(found)
        except WorkerError:
            self.shutdown()
            raise

    def describe(self) -> list[Note]:
        """What became of the layers, on the first place of each stage."""
        return self._notes

    def shutdown(self) -> None:
        """End the workers; calling it twice is fine."""
        self._end()

    @property
    def worker_pids(self) -> list[int]:
        return [process.pid for process in self._pids]

    def _answers(self) -> list[dict[str, Any]]:
        """The next message of every worker; the first that fails is told, whoever it is."""
        found: dict[int, dict[str, Any]] = {}
        while len(found) < len(self._sockets):
            waiting = [c for rank, c in enumerate(self._sockets) if rank not in found]
            for connection in wait(waiting):
                rank = self._sockets.index(connection)
                found[rank] = self._receive(rank)
        return [found[rank] for rank in range(len(self._sockets))]

    def _receive(self, rank: int) -> dict[str, Any]:
        try:
            message = decode(self._sockets[rank].recv_bytes())
        except (EOFError, OSError):
            self._fail(rank)
        if "error" in message:
            if message["kind"] == "ValueError":
                raise ValueError(message["error"])
            if message["kind"] == "PluginError":
                raise PluginError(f"{self._names[rank]} on {socket.gethostname()}: {message['error']}")
            time.sleep(0.1)  # it may only be the first to notice that another one has died
            for other, process in enumerate(self._pids):
                if process.poll():
                    self._fail(other)
            raise WorkerError(f"{self._names[rank]} failed: {message['error']}\n{message['traceback']}")
        return message

    def _fail(self, rank: int) -> None:
        process = self._pids[rank]
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        if code is None:
            how = "closed its connection"
        else:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise WorkerError(f"{self._names[rank]}, process {process.pid}, {how}; was there memory enough?") from None

    def _compare(self, plugins: Plugins, found: list[list[list[str]]]) -> None:
        wanted = {tuple(plugin) for plugin in plugins.manifest().plugins}
        for name, answer in zip(self._names, found, strict=True):
            theirs = {tuple(plugin) for plugin in answer}
            if wanted != theirs:
                raise PluginError(
                    f"{name} on {socket.gethostname()} sees other plugins than this process: it lacks "
                    f"{_listed(wanted - theirs)}, and has besides {_listed(theirs - wanted)}; install the same "
                    "packages for both, or name modules in plugins=[...]"
                )


def _listed(plugins: set[tuple[str, str, str | None]]) -> str:
    return ", ".join(f"{name} {version or f'({module})'}" for name, module, version in sorted(plugins)) or "none"


def _spawn(rank: int, count: int) -> tuple[subprocess.Popen, Connection]:
    ours, theirs = socket.socketpair()
    with theirs:
        environment = {
            # The processors are shared out, unless the user has.
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count)),
            "GLOO_SOCKET_IFNAME": "lo",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # modules that plugins= names
        }
        command = [sys.executable, "-m", "modelport.parallel.worker", str(theirs.fileno()), str(rank)]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
    return process, Connection(ours.detach())


def _memory(ready: dict[str, Any]) -> Memory:
    groups = [Group(BlockPool(blocks), window, cross) for blocks, window, cross in ready["groups"]]
    return Memory(groups, ready["num_rows"], ready["max_model_len"], ready["shareable"], [])


def _end(processes: list[subprocess.Popen], sockets: list[Connection], folder: tempfile.TemporaryDirectory) -> None:
    """Runs once: when asked to, when the executor is forgotten, or when Python ends."""
    for connection in sockets:
        connection.close()
    for process in processes:
        try:
            process.wait(PATIENCE if process is processes[0] else 0.1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    folder.cleanup()
