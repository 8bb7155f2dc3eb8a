"""Several machines without a cluster manager: each runs `modelport` with its `--node-rank`; machine 0 has the engine.

Decisions: machine 0 listens on a port that all know, as torchrun and SLURM do it; the others start an agent that keeps
trying until it is there. The secret comes from the environment, since command lines are seen by all.
"""

from __future__ import annotations

import logging
import os
import subprocess
from typing import TYPE_CHECKING

from modelport.parallel.agent import SECRET_VARIABLE
from modelport.parallel.channel import Listener
from modelport.parallel.fleet import PATIENCE, how_ended, start_agent

if TYPE_CHECKING:
    from modelport.config import EngineConfig

logger = logging.getLogger(__name__)


class NodesLauncher:
    """The agent of machine 0 is started here, those of the others by whoever runs them.

    :raises ValueError: settings that do not say where machine 0 is, or no secret.
    """

    first_device = 0

    def __init__(self, settings: EngineConfig):
        secret = _checked(settings)
        self.num_agents = settings.nnodes
        self._settings, self._secret = settings, secret
        self._process: subprocess.Popen | None = None

    def listen(self) -> Listener:
        return Listener((self._settings.master_addr, self._settings.master_port), self._secret)

    def launch(self, node: int, address: str) -> None:
        if node == 0:
            self._process = _start(self._settings, address, 0)
        else:
            logger.info("waiting for machine %d to connect to %s", node, address)

    def complaint(self, node: int) -> str | None:
        code = self._process.poll() if node == 0 and self._process is not None else None
        return None if code is None else how_ended(code)

    def end(self) -> None:
        if self._process is not None:
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def serve_node(settings: EngineConfig) -> int:
    """Work for the engine of machine 0 until it ends; the exit status.

    :raises ValueError: as `NodesLauncher`, or a number that no machine has.
    """
    _checked(settings)
    address = f"tcp:{settings.master_addr}:{settings.master_port}"
    process = _start(settings, address, settings.node_rank)
    try:
        return abs(process.wait())
    except KeyboardInterrupt:
        process.kill()  # its workers end with it
        process.wait()
        raise


def _start(settings: EngineConfig, address: str, node: int) -> subprocess.Popen:
    threads = max(1, len(os.sched_getaffinity(0)) * settings.nnodes // settings.num_places)
    early = {"plugins": list(settings.plugins), "blocked": list(settings.blocked_plugins)}
    return start_agent(address, node, threads, early)


def _checked(settings: EngineConfig) -> bytes:
    if settings.nnodes < 2 or settings.master_addr is None:
        raise ValueError(
            f"nnodes={settings.nnodes}, master_addr={settings.master_addr!r}: several machines need nnodes of 2 or "
            "more, and master_addr, the address of machine 0 that the others can reach"
        )
    if settings.node_rank >= settings.nnodes:
        raise ValueError(f"node_rank={settings.node_rank} is none of {settings.nnodes} machines; count from 0")
    secret = os.environ.get(SECRET_VARIABLE, "")
    if len(secret) < 16:
        raise ValueError(
            f"machines that work together share a secret of 16 characters or more in the environment variable "
            f"{SECRET_VARIABLE}; make one with `openssl rand -hex 32` and set it on each of {settings.nnodes} machines"
        )
    return secret.encode()
