"""A process that holds one place of a divided model; `agent` forks it.

Decisions: one thread runs steps, another receives: it answers the engine's pings while a step runs, with what the step
is at, and ends the process at once when the engine's connection closes, whatever the step waits for.
"""

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist

from modelport.config import EngineConfig
from modelport.engine.memory import Limits
from modelport.loading.checkpoint import read_config, resolve
from modelport.loading.model import describe
from modelport.modeling.adapters import adapters_of
from modelport.parallel.channel import Channel, Frame, Kind
from modelport.parallel.groups import DistributedLinks, Place
from modelport.parallel.network import interface_of
from modelport.parallel.place_runner import Loaded, load_place
from modelport.parallel.wire import PlanReader, write_result
from modelport.plugin import PluginError, Plugins

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when `parent` ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


class Status:
    """What a worker is at; `links` tell it while they wait for other places."""

    def __init__(self) -> None:
        self._what, self._since = "waits for the engine", time.monotonic()
        self.links: DistributedLinks | None = None

    def set(self, what: str) -> None:
        self._what, self._since = what, time.monotonic()

    def tell(self) -> dict[str, Any]:
        """`waits`: another place has to do something first."""
        waits = self.links.waits_for if self.links is not None else None
        return {"at": self._what if waits is None else f"{self._what}: {waits}", "waits": waits is not None,
                "seconds": round(time.monotonic() - self._since, 1)}  # fmt: skip


def serve(engine: Channel, rank: int, local: int, plugins: Plugins) -> None:
    """Do what the engine says until it is gone.

    :param local: number of the device on this machine.
    """
    status = Status()
    inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    engine.send(Frame.of(Kind.HELLO, {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}))
    threading.Thread(target=_receive, args=(engine, inbox, status), daemon=True).start()
    try:
        frame = inbox.get()
        store: dist.Store | None = None
        if frame.kind == Kind.MEET:
            store = _open_meeting(engine)
            frame = inbox.get()
        assert frame.kind == Kind.LOAD, frame.kind
        status.set("loads its part of the model")
        loaded = _load(engine, frame.message, rank, local, plugins, status, store)
        reader = PlanReader(adapters_of(loaded.model))
        while True:
            status.set("waits for the engine")
            frame = inbox.get()
            status.set(f"runs step {frame.number}")
            result = loaded.runner.step(reader.read(frame.message, frame.tensors()))
            if loaded.runner.place.samples:
                engine.send(Frame.of(Kind.RESULT, write_result(result), frame.number))
    except Exception as error:
        kind = next((k for k in (PluginError, ValueError) if isinstance(error, k)), RuntimeError)
        text = str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}"
        engine.send(Frame.of(Kind.ERROR, {"kind": kind.__name__, "error": text, "traceback": traceback.format_exc()}))
        _leave(1)


def _receive(engine: Channel, inbox: "queue.SimpleQueue[Frame]", status: Status) -> None:
    try:
        while True:
            frame = engine.receive()
            if frame.kind == Kind.PING:
                engine.send(Frame.of(Kind.PONG, status.tell(), frame.number))
            else:
                inbox.put(frame)
    except (EOFError, OSError):
        _leave(0)


def _leave(code: int) -> None:
    """Without ceremony: goodbyes of process groups wait for workers that may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _open_meeting(engine: Channel) -> dist.Store:
    """Listen, on this machine's address in the engine's network, for all workers, and tell where."""
    host = engine.own_address
    listening = socket.create_server((host, 0), backlog=256)
    port = listening.getsockname()[1]
    store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    engine.send(Frame.of(Kind.MEET, {"host": host, "port": port}))
    return store


def _load(
    engine: Channel, hello: dict[str, Any], rank: int, local: int, plugins: Plugins, status: Status,
    store: dist.Store | None,
) -> Loaded:  # fmt: skip
    settings = EngineConfig.model_validate(hello["settings"])
    settings = _on_device(settings, local)
    checkpoint = resolve(
        settings.model,
        settings.revision,
        plugins,
        load_format=settings.load_format,
        trust_remote_code=settings.trust_remote_code,
    )
    about = describe(checkpoint, read_config(checkpoint, plugins), plugins, settings)
    _meet(engine, hello["meet"], rank, settings.num_places, about.device, store)
    tp_size, pp_size = settings.tensor_parallel_size, settings.pipeline_parallel_size
    status.links = DistributedLinks(tp_size, pp_size, about.device)
    place = Place.of(rank, tp_size, pp_size, status.links)
    loaded = load_place(about, plugins, settings, place, Limits(*hello["limits"]), hello["progress"] and rank == 0)
    memory = loaded.memory
    engine.send(
        Frame.of(Kind.LOAD, {
            "groups": [[group.pool.num_blocks, group.window, group.cross] for group in memory.groups],
            "num_rows": memory.num_rows,
            "max_model_len": memory.max_model_len,
            "shareable": memory.shareable,
            "by_length": loaded.runner.by_length,
            "device": str(about.device),
            "notes": [list(astuple(note)) for note in loaded.notes],
        })
    )  # fmt: skip
    return loaded


def _on_device(settings: EngineConfig, local: int) -> EngineConfig:
    """The place's own device, when it is a GPU: by its number on this machine."""
    if settings.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return settings
    if local >= torch.cuda.device_count():
        raise ValueError(f"{socket.gethostname()} has {torch.cuda.device_count()} GPUs, too few for place {local + 1}")
    torch.cuda.set_device(local)
    return settings.model_copy(update={"device": f"cuda:{local}"})


def _meet(
    engine: Channel, meet: dict[str, Any], rank: int, count: int, device: torch.device, store: dist.Store | None
) -> None:
    """Make the default process group; tensors take the network through which the engine was reached."""
    if "file" in meet:
        store = dist.FileStore(meet["file"], count)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    elif store is None:
        store = dist.TCPStore(meet["host"], meet["port"], is_master=False, wait_for_workers=False)
    if engine.own_address and (name := interface_of(engine.own_address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
