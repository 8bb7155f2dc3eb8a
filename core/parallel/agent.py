"""The process on each machine that forks the workers there: `python -m modelport.parallel.agent ADDRESS NODE`.

Decisions: it imports torch and the plugins once, beside the engine that does the same, and a worker is a fork of it:
four start as fast as one, and share the memory of what was imported. It has one thread and computes nothing, and
touches no GPU, because neither threads nor a CUDA context survive a fork. It says how workers end, since only a parent
learns that, and ends them all when the engine's connection closes; they end with it even if it is killed.
"""

import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from typing import Any

from modelport.discovery import ENVIRONMENT_VARIABLE, PluginError, discover
from modelport.parallel.channel import Channel, ChannelError, Frame, Kind, connect

SECRET_VARIABLE = "MODELPORT_SECRET"
START_TIMEOUT = 300.0
"""Seconds in which the engine has to listen."""

WATCH = 0.5
"""Seconds between two looks at whether the parent still lives."""


class Agent:
    """Serves one engine.

    :param address: where the engine listens.
    :param node: number of this machine.
    """

    def __init__(self, address: str, node: int, secret: bytes | None):
        self._address, self._node, self._secret = address, node, secret
        self._engine = _connect(address, secret)
        self._workers: dict[int, int] = {}  # pid -> rank
        self._plugins = None
        self._bell, ring = os.pipe()
        os.set_blocking(ring, False)
        signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._engine.send(Frame.of(Kind.HELLO, {"node": node, "host": socket.gethostname(), "pid": os.getpid()}))

    def run(self) -> None:
        """Until the engine's connection closes, or whoever started this process is gone."""
        parent = os.getppid()
        try:
            while os.getppid() == parent:
                ready, _, _ = select.select([self._engine, self._bell], [], [], WATCH)
                if self._bell in ready:
                    os.read(self._bell, 4096)
                    self._reap()
                if self._engine in ready:
                    self._answer(self._engine.receive())
        except (EOFError, OSError):
            pass  # the engine is gone
        finally:
            self._kill()
            if self._address.startswith("unix:"):
                shutil.rmtree(os.path.dirname(self._address.removeprefix("unix:")), ignore_errors=True)

    def _answer(self, frame: Frame) -> None:
        if frame.kind == Kind.PLUGINS:
            try:
                found = self._load([tuple(plugin) for plugin in frame.message["plugins"]])
            except PluginError as error:
                found = {"problems": [str(error)]}
            self._engine.send(Frame.of(Kind.PLUGINS, found))
        elif frame.kind == Kind.FORK:
            for rank, local in frame.message["ranks"]:
                self._fork(rank, local)
        elif frame.kind == Kind.KILL:
            self._kill()
            self._engine.send(Frame(Kind.KILL, frame.number))

    def _load(self, wanted: list[tuple[str, str, str | None]]) -> dict[str, Any]:
        """Load exactly these, whatever else there is; what is wrong with them, if anything."""
        from modelport.plugin import load_plugins

        os.environ.pop(ENVIRONMENT_VARIABLE, None)  # the engine's counts, and is part of `wanted`
        installed = {record.name for record in discover()}
        names = {name for name, _, _ in wanted}
        missing = [(name, version) for name, module, version in wanted if name not in installed and name != module]
        problems = [f"lacks the plugin {name!r} {version or ''}".rstrip() for name, version in missing]
        extra = [module for name, module, _ in wanted if name not in installed and name == module]
        try:
            plugins = load_plugins(extra, installed - names)
        except PluginError as error:
            return {"problems": [*problems, f"cannot load what was asked for: {error}"]}
        records = {record.name: record for record in plugins.records}
        for name, _, version in wanted:
            record = records.get(name)
            if record is None:
                continue  # it is missing
            if record.status == "broken":
                problems.append(f"has a broken plugin {record}: {record.reason}")
            elif record.version != version:
                problems.append(f"has version {record.version} of the plugin {name!r}, and the engine {version}")
        self._plugins = plugins
        return {"problems": problems}

    def _fork(self, rank: int, local: int) -> None:
        import torch

        assert not torch.cuda.is_initialized()
        gc.collect()
        gc.freeze()  # else the collector would touch, and so copy, all that is shared
        engine = os.getpid()
        pid = os.fork()
        if pid:
            self._workers[pid] = rank
            return
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._engine.close()
            from modelport.parallel.worker import end_with_parent, serve

            end_with_parent(engine)
            serve(connect(self._address, self._secret), rank, local, self._plugins)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _reap(self) -> None:
        for pid in list(self._workers):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                code = os.waitstatus_to_exitcode(status)
                self._engine.send(Frame.of(Kind.ENDED, {"rank": self._workers.pop(pid), "pid": pid, "code": code}))

    def _kill(self) -> None:
        """What workers have is lost in any case, and a stopped one hears nothing else."""
        for pid in self._workers:
            os.kill(pid, signal.SIGKILL)
        for pid in self._workers:
            os.waitpid(pid, 0)
        self._workers.clear()


def _connect(address: str, secret: bytes | None) -> Channel:
    """Between machines, this one may be the first to be there."""
    until = time.monotonic() + START_TIMEOUT
    while True:
        try:
            return connect(address, secret)
        except ChannelError:
            raise
        except OSError:
            if address.startswith("unix:") or time.monotonic() > until:
                raise
            time.sleep(0.2)


def import_early(plugins: list[str], blocked: list[str]) -> None:
    """Import what loading the plugins will import; what is wrong with them is told then."""
    import_module("modelport.parallel.worker")
    with suppress(PluginError):
        for record in discover(plugins, blocked):
            if record.status == "installed":
                with suppress(Exception, SystemExit):
                    import_module(record.module)


def main(address: str, node: int, early: dict[str, list[str]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's, which ends us
    # Else to ask whether there is a GPU would start CUDA here, and no fork of this process could use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    secret = os.environ.pop(SECRET_VARIABLE, None)
    try:
        agent = Agent(address, node, None if secret is None or address.startswith("unix:") else secret.encode())
    except OSError as error:
        print(f"modelport: error: cannot reach the engine at {address}: {error}", file=sys.stderr)
        sys.exit(2)
    import_early(early.get("plugins", []), early.get("blocked", []))
    agent.run()
    os._exit(0)  # what was imported needs no tidying up


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})
