"""A process that holds one place of a divided model: `python -m modelport.parallel.worker DESCRIPTOR RANK`.

Decisions: the descriptor is a socket to the engine's process, inherited, so that nothing listens for strangers; what
comes over it is JSON. A worker ends when that socket closes, and when its parent is gone even while it waits for
another worker; it leaves Ctrl-C to the engine.
"""

import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from modelport.config import EngineConfig
from modelport.engine.memory import Limits
from modelport.loading.checkpoint import read_config, resolve
from modelport.loading.model import describe
from modelport.parallel.groups import DistributedLinks, Place
from modelport.parallel.place_runner import Loaded, load_place
from modelport.parallel.wire import PlanReader, decode, encode, write_result
from modelport.plugin import PluginError, load_plugins

WATCH = 0.5
"""Seconds between two looks at whether the parent still lives."""


def main(descriptor: int, rank: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    engine = Connection(descriptor)
    try:
        loaded = _load(engine, decode(engine.recv_bytes()), rank)
        reader = PlanReader()
        while True:
            message = decode(engine.recv_bytes())
            result = loaded.runner.step(reader.read(message))
            if loaded.runner.place.samples:
                engine.send_bytes(encode({"step": message["step"], **write_result(result)}))
    except (EOFError, ConnectionError):
        pass  # the engine is gone
    except Exception as error:
        kind = next((k for k in (PluginError, ValueError) if isinstance(error, k)), RuntimeError)
        text = str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}"
        told = {"kind": kind.__name__, "error": text, "traceback": traceback.format_exc()}
        engine.send_bytes(encode(told))
    finally:
        # Without ceremony: goodbyes of process groups wait for workers that may be gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)


def _load(engine: Connection, hello: dict[str, Any], rank: int) -> Loaded:
    settings = EngineConfig.model_validate(hello["settings"])
    plugins = load_plugins(extra=settings.plugins, blocked=settings.blocked_plugins)
    engine.send_bytes(encode({"plugins": plugins.manifest().plugins}))
    if torch.cuda.is_available() and settings.device in ("auto", "cuda"):
        settings = settings.model_copy(update={"device": f"cuda:{rank}"})
        torch.cuda.set_device(rank)
    checkpoint = resolve(
        settings.model,
        settings.revision,
        plugins,
        load_format=settings.load_format,
        trust_remote_code=settings.trust_remote_code,
    )
    about = describe(checkpoint, read_config(checkpoint, plugins), plugins, settings)
    backend = "nccl" if about.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=hello["meet"], rank=rank, world_size=settings.num_places)
    tp_size, pp_size = settings.tensor_parallel_size, settings.pipeline_parallel_size
    place = Place.of(rank, tp_size, pp_size, DistributedLinks(tp_size, pp_size, about.device))
    loaded = load_place(about, plugins, settings, place, Limits(*hello["limits"]), hello["progress"] and rank == 0)
    memory = loaded.memory
    engine.send_bytes(
        encode({
            "groups": [[group.pool.num_blocks, group.window, group.cross] for group in memory.groups],
            "num_rows": memory.num_rows,
            "max_model_len": memory.max_model_len,
            "shareable": memory.shareable,
            "by_length": loaded.runner.by_length,
            "notes": [[note.path, note.divided, note.how] for note in loaded.notes],
        })
    )  # fmt: skip
    return loaded


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
